"""Text to tokens in units: in parallel, each kept on disk, so that a killed `prepare` goes on where it was.

The documents are one stream, whatever reads them. It is cut into units of about `UNIT_BYTES` at places that depend on
the stream alone; threads tokenise units (the tokenizer runs outside Python's lock), each is written to
`NNNNNN.npz` and renamed when whole, and they come out in order. So the tokens depend neither on the number of threads
nor on interruptions, and no more than a few units are in memory.
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

from mythos_jax.data.sources import Input, Piece, cut_piece, pieces
from mythos_jax.data.tokenizer import Tokenizer

UNIT_BYTES = 16 << 20  # of UTF-8 text
BATCH_BYTES = 1 << 20  # text handed to the tokenizer at a time


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces of text, not yet tokenised. `next_input`: where reading goes on when the unit ends a file,
    else -1; `text_end`: bytes of text up to the end of the unit."""

    number: int
    pieces: tuple[Piece, ...]
    next_input: int
    text_end: int


@dataclass(frozen=True)
class Tokens:
    """A tokenised unit: for each of n pieces its tokens (`tokens` is all of them, `lengths` int64 [n] cuts it), UTF-8
    bytes, whether it begins a document, whether it is held out. `next_input` and `text_end` as in `Unit`."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    begins: np.ndarray
    held_out: np.ndarray
    next_input: np.ndarray
    text_end: np.ndarray

    def __iter__(self) -> Iterator[tuple[np.ndarray, int, bool, bool]]:
        """Tokens, text bytes, begins and held_out of each piece."""
        ends = np.cumsum(self.lengths)
        for i, end in enumerate(ends):
            tokens = self.tokens[end - self.lengths[i] : end]
            yield tokens, int(self.text_bytes[i]), bool(self.begins[i]), bool(self.held_out[i])


@dataclass(frozen=True)
class Tokeniser:
    """What is made of a piece: tokens of `dtype`, and whether it is held out. folder: where units are kept."""

    tokenizer: Tokenizer
    dtype: str
    held_out_fraction: float
    folder: Path

    def __call__(self, unit: Unit) -> Tokens:
        """The unit's tokens, from the folder where they are there and whole."""
        kept = load_unit(self.folder, unit.number)
        if kept is not None:
            return kept
        parts = []
        for batch in _batches(unit.pieces):
            encoded = self.tokenizer.encode_batch([piece.text for piece in batch])
            parts += [tokens.astype(self.dtype) for tokens in encoded]
        made = Tokens(
            tokens=np.concatenate(parts),
            lengths=np.array([len(part) for part in parts], np.int64),
            text_bytes=np.array([len(piece.text.encode()) for piece in unit.pieces], np.int64),
            begins=np.array([piece.begins for piece in unit.pieces]),
            held_out=np.array([is_held_out(piece.name, self.held_out_fraction) for piece in unit.pieces]),
            next_input=np.int64(unit.next_input),
            text_end=np.int64(unit.text_end),
        )
        file = _file(self.folder, unit.number)
        with open(file.with_suffix(".part"), "wb") as target:
            np.savez(target, **{field.name: getattr(made, field.name) for field in fields(Tokens)})
        os.replace(file.with_suffix(".part"), file)
        return made


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is kept for evaluation: the same answer on every machine, in any corpus."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def tokenised(inputs: Sequence[Input], max_bytes: int, tokenise: Tokeniser, workers: int) -> Iterator[Tokens]:
    """The units of the text of `inputs` (cut at `max_bytes` bytes, 0: not), in order. workers: threads.

    Raises ConfigError: as `sources.pieces`, or text that the tokenizer cannot encode.
    """
    # What there is from before; files that it has used up are not read again.
    given, resume = 0, (0, 0, 0)
    while (kept := load_unit(tokenise.folder, given)) is not None:
        yield kept
        given += 1
        if kept.next_input >= 0:
            resume = (given, int(kept.next_input), int(kept.text_end))

    waiting: deque[Future[Tokens]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for unit in cut(inputs, max_bytes, *resume):
                if unit.number < given:
                    continue
                waiting.append(pool.submit(tokenise, unit))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def cut(inputs: Sequence[Input], max_bytes: int, number: int = 0, start: int = 0, text: int = 0) -> Iterator[Unit]:
    """The stream of text as units, from unit `number` on, which begins with input `start` after `text` bytes."""
    held, size = [], 0
    for index in range(start, len(inputs)):
        large = False  # a file of several units ends one, so that it need not be read again for the next
        for piece in pieces([inputs[index]]):
            if size >= UNIT_BYTES:
                yield Unit(number, tuple(held), -1, text)
                number, held, size, large = number + 1, [], 0, True
            length = len(piece.text.encode())
            full = max_bytes and text + length >= max_bytes
            if full:
                piece = cut_piece(piece, max_bytes - text)
            if piece.text:
                held.append(piece)
            size, text = size + length, text + length
            if full:
                break
        if max_bytes and text >= max_bytes:
            break
        if held and (large or size >= UNIT_BYTES):
            yield Unit(number, tuple(held), index + 1, text)
            number, held, size = number + 1, [], 0
    if held:
        yield Unit(number, tuple(held), len(inputs), text)


def load_unit(folder: Path, number: int) -> Tokens | None:
    """A unit from before, or None where there is none, or one that is not whole (each array has a checksum)."""
    try:
        with np.load(_file(folder, number), allow_pickle=False) as arrays:
            return Tokens(**{field.name: arrays[field.name] for field in fields(Tokens)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with contextlib.suppress(OSError):
            _file(folder, number).unlink()
        return None


def _batches(documents: Sequence[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in documents:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npz"
