"""The rows of one split on disk: how documents become rows, and how rows are read by number.

The tokens of a split are one stream, with an end-of-document token E before, between and after the documents:
`E doc1 E doc2 E`. Row r of T targets holds stream[r T : r T + T + 1]. Neighbouring rows share one token, so every token
but the first E is a target exactly once. The last row may be shorter. A row is stored as its tokens, little-endian
uint16 or uint32; the files are described in shards.py.

Rows of conversations are packed (pack.py).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mythos_jax.data.batch import Batch
from mythos_jax.data.manifest import SPLITS, Split, load_manifest
from mythos_jax.data.pack import unpack
from mythos_jax.data.row_file import RowFile, TokenPiece
from mythos_jax.data.shards import SHARD_BYTES
from mythos_jax.data.stored_rows import open_stored_rows
from mythos_jax.errors import ConfigError
from mythos_jax.typed import check_field


class RowWriter(RowFile):
    """Cuts the token stream of one split into rows and writes them."""

    def __init__(
        self, folder: Path, split: str, seq_len: int, dtype: str, end_of_document: int, shard_bytes: int = SHARD_BYTES
    ):
        super().__init__(folder, split, (seq_len + 1) * np.dtype(dtype).itemsize, shard_bytes)
        self.seq_len = seq_len
        self.documents = self.text_bytes = self.tokens_written = 0
        self._end_of_document = np.array([end_of_document], dtype)
        self._pending = np.array([], dtype)  # the stream from the start of the next row

    def add(self, piece: TokenPiece) -> None:
        """Appends the start of a document or the next part of the current one."""
        self.documents += piece.begins
        self.text_bytes += piece.text_bytes
        self.append([self._end_of_document, piece.tokens] if piece.begins else [piece.tokens])

    def close(self) -> Split:
        """Writes the last row and the last file. Raises ConfigError as `finish` does."""
        if self.documents:
            self.append([self._end_of_document])
        if len(self._pending) > 1:
            self._write(self._pending)
        return Split(
            documents=self.documents,
            text_bytes=self.text_bytes,
            tokens=self.tokens_written - self.rows,  # the first token of a row is not a target in it
            **self.finish(),
        )

    def append(self, parts: list[np.ndarray]) -> None:
        stream = np.concatenate([self._pending, *(part.astype(self._pending.dtype) for part in parts)])
        complete_rows = max(len(stream) - 1, 0) // self.seq_len
        for start in range(0, complete_rows * self.seq_len, self.seq_len):
            self._write(stream[start : start + self.seq_len + 1])
        self._pending = stream[complete_rows * self.seq_len :]

    def _write(self, row: np.ndarray) -> None:
        self.tokens_written += len(row)
        self.write(row.tobytes())


class TokenRows:
    """The rows of one split, by number. Safe to share between threads.

    `rows[i]` is {"tokens": int32 [T], "targets": int32 [T], "mask": bool [T]}. The targets are the tokens that follow;
    the mask is False on the padding (end-of-document tokens) of a short last row.

    With `document_mask` also "segment_ids", int32 [T]: the document that the target belongs to, counted from 1 in the
    row; 0 on padding. An end-of-document token belongs to the document it ends when it is a target, and to the next
    document when it is an input. A document in the middle of a row thus sees the same context as a prompt does.

    Rows of conversations always have segment_ids, the number of the sample that the token belongs to, and their mask,
    float32, is the weight of the target. `weighted` gives rows of text the same form: with a mask of float32, and, if
    documents are not kept apart, one segment. patient: as of `Storage`.
    """

    def __init__(
        self, folder: str | Path, split: str, document_mask: bool = False, weighted: bool = False, patient: bool = True
    ):
        check_field(split in SPLITS, "split", split, ", ".join(SPLITS))
        self.manifest = load_manifest(folder)
        self.name = f"{folder}: {split}"
        self._document_mask, self._weighted = document_mask, weighted
        self._split = self.manifest.splits[split]
        self._dtype = np.dtype(self.manifest.dtype)
        self._stored = open_stored_rows(folder, split, self.manifest, patient)

    @property
    def remote(self) -> bool:
        """Whether the rows are read from an object store."""
        return self._stored.remote

    def close(self) -> None:
        """Ends what waits for storage that does not answer. The rows are not read after that."""
        self._stored.close()

    def __len__(self) -> int:
        return self._split.rows

    def __getitem__(self, index: int) -> Batch:
        return {name: array[0] for name, array in self.read([index]).items()}

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Reads n rows by number: arrays [n, T], as described above.

        Raises IndexError, and ConfigError naming file and row if the file is damaged.
        """
        numbers = [int(i) for i in indices]
        for number in numbers:
            if not 0 <= number < len(self):
                raise IndexError(f"row {number} of {self.name}, which has {len(self)} rows")
        return self._read_packed(numbers) if self.manifest.chat is not None else self._read_text(numbers)

    def stream(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A row without its padding: its ids, int32 [n], what each of them weighs as a target, float32 (the first is
        none), and the document or sample that each belongs to, int32. Raises as `read` does."""
        if self.manifest.chat is not None:
            return self._unpack(number, self._stored.read([number])[0])
        batch = self._read_text([number])
        length = int(batch["mask"].sum())
        segments = self._segment_ids(batch)[0, :length]
        ids = np.concatenate([batch["tokens"][0, :1], batch["targets"][0, :length]])
        return ids, np.arange(length + 1, dtype=np.float32).clip(max=1), np.concatenate([segments[:1], segments])

    def _read_text(self, numbers: list[int]) -> Batch:
        stream = self._padding(len(numbers))
        lengths = np.array([self._length(number) for number in numbers], np.int32)
        for i, record in enumerate(self._stored.read(numbers)):
            if len(record) != lengths[i] * self._dtype.itemsize:
                raise self._damaged(numbers[i], f"got {len(record)} bytes")
            stream[i, : lengths[i]] = np.frombuffer(record, self._dtype)
        mask = np.arange(self.manifest.seq_len) < lengths[:, None] - 1
        batch = {"tokens": stream[:, :-1], "targets": stream[:, 1:], "mask": mask}
        if self._document_mask:
            batch["segment_ids"] = self._segment_ids(batch)
        elif self._weighted:
            batch["segment_ids"] = mask.astype(np.int32)
        return batch | {"mask": mask.astype(np.float32)} if self._weighted else batch

    def _read_packed(self, numbers: list[int]) -> Batch:
        stream = self._padding(len(numbers))
        weights, samples = np.zeros(stream.shape, np.float32), np.zeros(stream.shape, np.int32)
        for i, record in enumerate(self._stored.read(numbers)):
            ids, row_weights, row_samples = self._unpack(numbers[i], record)
            stream[i, : len(ids)], weights[i, : len(ids)], samples[i, : len(ids)] = ids, row_weights, row_samples
        return {
            "tokens": stream[:, :-1],
            "targets": stream[:, 1:],
            "mask": weights[:, 1:],
            "segment_ids": samples[:, :-1],
        }

    def _unpack(self, number: int, record: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:
            ids, weights, samples = unpack(record, self._dtype)
            if len(ids) > self.manifest.seq_len + 1:
                raise ValueError(f"got {len(ids)} tokens")
        except ValueError as error:
            raise self._damaged(number, str(error)) from None
        return ids.astype(np.int32), weights.astype(np.float32), samples.astype(np.int32)

    def _padding(self, rows: int) -> np.ndarray:
        return np.full((rows, self.manifest.seq_len + 1), self.manifest.end_of_document, np.int32)

    def _segment_ids(self, batch: Batch) -> np.ndarray:
        starts = batch["tokens"] == self.manifest.end_of_document
        starts[:, :1] = True  # a row may begin inside a document
        return np.where(batch["mask"], np.cumsum(starts, axis=1, dtype=np.int32), np.int32(0))

    def _length(self, number: int) -> int:
        """Tokens in a row, one more than its targets."""
        return min(self.manifest.seq_len, self._split.tokens - number * self.manifest.seq_len) + 1

    def _damaged(self, number: int, reason: str) -> ConfigError:
        return ConfigError(f"{self._stored.place(number)}: damaged ({reason}); prepare the folder again")
