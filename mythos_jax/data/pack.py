"""Packs whole samples of conversations into rows.

Best fit with a bounded number of open rows (bounded-space best fit of bin packing): a sample goes into the open row
that has the least room left of those with enough of it, else into a new one; the fullest row is written when too many
are open. The rows depend on the samples and their order alone.

A row of T targets has up to T + 1 tokens, of one sample after the other. It is stored as their ids (little-endian, in
the folder's dtype), their weights as targets (float32), and the numbers of their samples, counted from 1 (int32). The
first token of a sample has the weight 0, because no token of its own is before it.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from mythos_jax.data.manifest import ChatSplit, Split
from mythos_jax.data.row_file import RowFile, TokenPiece
from mythos_jax.data.shards import SHARD_BYTES

OPEN_ROWS = 128


@dataclass(eq=False)
class _Row:
    """A row that has room for more samples."""

    tokens: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    length: int = 0

    def add(self, tokens: np.ndarray, weights: np.ndarray) -> None:
        self.tokens.append(tokens)
        self.weights.append(weights)
        self.length += len(tokens)


class PackedWriter(RowFile):
    """Writes the packed rows of one split."""

    def __init__(
        self, folder: Path, split: str, seq_len: int, dtype: str, end_of_document: int, shard_bytes: int = SHARD_BYTES
    ):
        super().__init__(folder, split, (seq_len + 1) * (np.dtype(dtype).itemsize + 8), shard_bytes)
        self._room, self._dtype = seq_len + 1, dtype
        self._open: list[_Row] = []  # the oldest first
        self._conversations = self._text_bytes = self._targets = 0
        self._counts = dict.fromkeys((field.name for field in fields(ChatSplit)), 0)

    def add(self, piece: TokenPiece) -> None:
        """Adds a sample, of at most as many tokens as a row has; one without an answer is left out."""
        tokens, weights = piece.tokens, piece.weights
        self._conversations += piece.begins
        self._text_bytes += piece.text_bytes
        for name, count in piece.counts.items():
            self._counts[name] += count
        if not weights.any():
            self._counts["without_answer"] += 1
            return
        self._counts["samples"] += 1
        self._counts["trained"] += int((weights > 0).sum())
        self._place(tokens, weights)

    def _place(self, tokens: np.ndarray, weights: np.ndarray) -> None:
        fitting = [row for row in self._open if row.length + len(tokens) <= self._room]
        if fitting:
            row = max(fitting, key=lambda row: row.length)  # the oldest of those that are equally full
        else:
            if len(self._open) == OPEN_ROWS:
                self._write_row(max(self._open, key=lambda row: row.length))
            row = _Row()
            self._open.append(row)
        row.add(tokens, weights)
        if row.length == self._room:
            self._write_row(row)

    def close(self) -> Split:
        """Writes the open rows and the last file. Raises ConfigError as `finish` does."""
        while self._open:
            self._write_row(self._open[0])
        return Split(
            documents=self._conversations,
            text_bytes=self._text_bytes,
            tokens=self._counts["trained"],
            **self.finish(),
        )

    def counts(self) -> ChatSplit:
        masked = self._targets - self._counts["trained"]
        padding = self.rows * (self._room - 1) - self._targets
        return ChatSplit(**self._counts | {"masked": masked, "padding": padding})

    def _write_row(self, row: _Row) -> None:
        self._open.remove(row)
        self._targets += row.length - 1
        numbers = np.repeat(np.arange(1, len(row.tokens) + 1, dtype="<i4"), [len(tokens) for tokens in row.tokens])
        arrays = (
            np.concatenate(row.tokens).astype(self._dtype),
            np.concatenate(row.weights).astype("<f4"),
            numbers,
        )
        self.write(b"".join(array.tobytes() for array in arrays))


def unpack(record: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids, weights and sample numbers of a record. Raises ValueError for one that is damaged."""
    length, rest = divmod(len(record), dtype.itemsize + 8)
    if rest:
        raise ValueError(f"got {len(record)} bytes")
    ids, weights, numbers = np.split(
        np.frombuffer(record, np.uint8), [length * dtype.itemsize, length * (dtype.itemsize + 4)]
    )
    return ids.view(dtype), weights.view("<f4"), numbers.view("<i4")
