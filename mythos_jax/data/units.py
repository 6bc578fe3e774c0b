"""Tokenizes text in units: in parallel, and kept on disk so that a killed `prepare` resumes where it was.

The documents of all sources form one stream of text. It is cut into units of about `UNIT_BYTES` at positions that
depend on the stream alone. Threads tokenize units (the tokenizer releases Python's lock), write each to `NNNNNN.npz`
atomically, and yield them in order. The tokens therefore depend neither on the number of threads nor on interruptions,
and only a few units are in memory at a time.
"""

import contextlib
import hashlib
import os
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mythos_jax.data.sources import InputFile, Piece, read_pieces, truncate_piece
from mythos_jax.data.tokenizer import Tokenizer

UNIT_BYTES = 16 << 20  # UTF-8 text per unit
ENCODE_BYTES = 1 << 20  # text per call of the tokenizer


@dataclass(frozen=True)
class TextUnit:
    """Consecutive pieces of text, to be tokenized together.

    next_input: index of the input that follows if the unit ends with a file, else -1.
    text_end: bytes of text from the start of the stream to the end of the unit.
    """

    number: int
    pieces: tuple[Piece, ...]
    next_input: int
    text_end: int


@dataclass(frozen=True)
class TokenUnit:
    """A tokenized unit of n pieces. The field names are keys in the .npz file, where `next_input` and `text_end` (see
    `TextUnit`) are int64 scalars."""

    tokens: np.ndarray  # of all pieces, in the dtype of the rows
    lengths: np.ndarray  # int64 [n]: tokens per piece
    text_bytes: np.ndarray  # int64 [n]: UTF-8 bytes per piece
    begins: np.ndarray  # bool [n]: whether a document starts with the piece
    held_out: np.ndarray  # bool [n]
    next_input: np.ndarray
    text_end: np.ndarray

    def __iter__(self) -> Iterator[tuple[np.ndarray, int, bool, bool]]:
        """The tokens, text bytes, begins and held_out of each piece."""
        ends = np.cumsum(self.lengths)
        for i, end in enumerate(ends):
            tokens = self.tokens[end - self.lengths[i] : end]
            yield tokens, int(self.text_bytes[i]), bool(self.begins[i]), bool(self.held_out[i])


@dataclass(frozen=True)
class UnitTokenizer:
    """Tokenizes units into tokens of `dtype`, and stores them in `folder`."""

    tokenizer: Tokenizer
    dtype: str
    held_out_fraction: float
    folder: Path

    def __call__(self, unit: TextUnit) -> TokenUnit:
        """The unit's tokens, read from `folder` if they are stored there."""
        stored = load_unit(self.folder, unit.number)
        if stored is not None:
            return stored
        encoded: list[np.ndarray] = []
        for batch in _encode_batches(unit.pieces):
            token_lists = self.tokenizer.encode_batch([piece.text for piece in batch])
            encoded += [tokens.astype(self.dtype) for tokens in token_lists]
        tokenized = TokenUnit(
            tokens=np.concatenate(encoded),
            lengths=np.array([len(tokens) for tokens in encoded], np.int64),
            text_bytes=np.array([len(piece.text.encode()) for piece in unit.pieces], np.int64),
            begins=np.array([piece.begins for piece in unit.pieces]),
            held_out=np.array([is_held_out(piece.name, self.held_out_fraction) for piece in unit.pieces]),
            next_input=np.array(unit.next_input, np.int64),
            text_end=np.array(unit.text_end, np.int64),
        )
        _store_unit(self.folder, unit.number, tokenized)
        return tokenized


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out: the same answer on every machine and in every corpus."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def tokenize_units(
    inputs: Sequence[InputFile], max_bytes: int, tokenize: UnitTokenizer, workers: int
) -> Iterator[TokenUnit]:
    """The tokenized units of the text of `inputs`, in order.

    max_bytes: of text to read; 0: all. workers: number of threads.
    Raises ConfigError: as `sources.read_pieces` does, or for text that the tokenizer cannot encode.
    """
    # Units from an interrupted run come first. Reading resumes at the last file boundary among them, so that files
    # which they cover completely are not read again.
    stored_count, resume_at = 0, (0, 0, 0)
    while (stored := load_unit(tokenize.folder, stored_count)) is not None:
        yield stored
        stored_count += 1
        if stored.next_input >= 0:
            resume_at = (stored_count, int(stored.next_input), int(stored.text_end))

    pending: deque[Future[TokenUnit]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for unit in cut_units(inputs, max_bytes, *resume_at):
                if unit.number < stored_count:
                    continue
                pending.append(pool.submit(tokenize, unit))
                if len(pending) > workers:  # bounds the units in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def cut_units(
    inputs: Sequence[InputFile], max_bytes: int, number: int = 0, first_input: int = 0, text_end: int = 0
) -> Iterator[TextUnit]:
    """Cuts the stream of text into units.

    To resume: `number` is that of the first unit, which starts with input `first_input`, after `text_end` bytes.
    """
    unit: list[Piece] = []
    unit_bytes = 0
    for index in range(first_input, len(inputs)):
        # The last unit of a file of several units ends with the file, so that a resumed run need not read the file
        # again to continue after it.
        spans_units = False
        for piece in read_pieces([inputs[index]]):
            if unit_bytes >= UNIT_BYTES:
                yield TextUnit(number, tuple(unit), -1, text_end)
                number, unit, unit_bytes, spans_units = number + 1, [], 0, True
            piece_bytes = len(piece.text.encode())
            is_last = bool(max_bytes) and text_end + piece_bytes >= max_bytes
            if is_last:
                piece = truncate_piece(piece, max_bytes - text_end)
            if piece.text:
                unit.append(piece)
            unit_bytes, text_end = unit_bytes + piece_bytes, text_end + piece_bytes
            if is_last:
                break
        if max_bytes and text_end >= max_bytes:
            break
        if unit and (spans_units or unit_bytes >= UNIT_BYTES):
            yield TextUnit(number, tuple(unit), index + 1, text_end)
            number, unit, unit_bytes = number + 1, [], 0
    if unit:
        yield TextUnit(number, tuple(unit), len(inputs), text_end)


def load_unit(folder: Path, number: int) -> TokenUnit | None:
    """A stored unit; None if there is none or it is damaged (each array has a checksum)."""
    file = _unit_file(folder, number)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return TokenUnit(**{field.name: arrays[field.name] for field in fields(TokenUnit)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with contextlib.suppress(OSError):
            file.unlink()
        return None


def _store_unit(folder: Path, number: int, unit: TokenUnit) -> None:
    """Writes under a temporary name first: a unit that exists under its own name is complete."""
    file = _unit_file(folder, number)
    partial = file.with_suffix(".part")
    with open(partial, "wb") as stream:
        np.savez(stream, **{field.name: getattr(unit, field.name) for field in fields(TokenUnit)})
    os.replace(partial, file)


def _encode_batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Groups pieces into calls of the tokenizer, with enough text in each to use its threads."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _unit_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npz"
