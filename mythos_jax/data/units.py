"""Tokenizes text in units: in parallel, and kept on disk so that a `prepare` that was stopped resumes where it was.

The documents of all sources form one stream of text. It is cut into units of about `UNIT_BYTES` at positions that
depend on the stream alone. Threads tokenize units (the tokenizer releases Python's lock), write each to `NNNNNN.npz`
atomically, and yield them in order. The tokens therefore depend neither on the number of threads nor on interruptions,
and only a few units are in memory at a time.

A stored unit knows the hash of its text and that of the files up to its end. While these files are as they were, it is
used without reading them; if they have changed, they are read, and it is used if its text is the same.
"""

import contextlib
import hashlib
import json
import os
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mythos_jax.data.input_file import InputFile
from mythos_jax.data.manifest import COUNTS
from mythos_jax.data.readers import LeftOut, Piece, Reading, read_pieces, truncate_piece
from mythos_jax.data.row_file import TokenPiece
from mythos_jax.data.split import Division, draw
from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.data.workers import Workers

UNIT_BYTES = 16 << 20  # UTF-8 text per unit
ENCODE_BYTES = 1 << 20  # text per call of the tokenizer
LISTED = 1000  # things left out that a unit lists; of more it keeps the number


@dataclass(frozen=True)
class TextStream:
    """The text of `inputs`. max_bytes: of it to read; 0: all. division: of its only document, if it has no other."""

    inputs: Sequence[InputFile]
    reading: Reading = field(default_factory=Reading)
    max_bytes: int = 0
    division: Division | None = None

    @cached_property
    def states(self) -> list[str]:
        """For each number of files, a hash of the current state of that many, and at the end one of all of them."""
        options = [self.reading.text_column, self.max_bytes, self.division and asdict(self.division)]
        states = [_sha256(json.dumps(options).encode())]
        for file in self.inputs:
            state = [states[-1], file.name, file.location, file.size, file.modified, file.given]
            states.append(_sha256(json.dumps(state).encode()))
        return [*states, _sha256(f"{states[-1]} end".encode())]


@dataclass(frozen=True)
class TextUnit:
    """Consecutive pieces of text, to be tokenized together.

    left_out: what is left out between them. next_input: index of the input that follows if the unit ends with a file,
    else -1. text_end: bytes of text from the start of the stream to the end of the unit. state: of the files up to
    there (see `TextStream.states`).
    """

    number: int
    pieces: tuple[Piece, ...]
    left_out: tuple[LeftOut, ...]
    next_input: int
    text_end: int
    state: str

    @property
    def text(self) -> str:
        """A hash of everything that the tokens depend on, and of what is left out."""
        content = hashlib.sha256()
        for piece in self.pieces:
            data = piece.text.encode()
            content.update(json.dumps([piece.name, piece.begins, piece.held_out, len(data)]).encode())
            content.update(data)
        content.update(json.dumps([asdict(item) for item in self.left_out]).encode())
        return content.hexdigest()


@dataclass(frozen=True)
class TokenUnit:
    """A tokenized unit of n pieces; of conversations, n samples. The field names are keys in the .npz file, where
    `next_input` and `text_end` (see `TextUnit`) are int64 scalars, `state` and `text` hashes as ASCII text, and
    `left_out` JSON."""

    tokens: np.ndarray  # of all pieces, in the dtype of the rows
    lengths: np.ndarray  # int64 [n]: tokens per piece
    text_bytes: np.ndarray  # int64 [n]: UTF-8 bytes per piece
    begins: np.ndarray  # bool [n]: whether a document starts with the piece
    draws: np.ndarray  # uint64 [n]: decides whether the document is held out (see `split.draw`)
    next_input: np.ndarray
    text_end: np.ndarray
    state: np.ndarray
    text: np.ndarray
    left_out: np.ndarray
    # Of conversations only.
    weights: np.ndarray | None = None  # float32, of each token as a target
    counts: np.ndarray | None = None  # int64 [n, len(manifest.COUNTS)]

    def __iter__(self) -> Iterator[tuple[int, TokenPiece]]:
        """The draw of each piece, and the piece."""
        ends = np.cumsum(self.lengths)
        for i, end in enumerate(ends):
            span = slice(end - self.lengths[i], end)
            piece = TokenPiece(self.tokens[span], int(self.text_bytes[i]), bool(self.begins[i]))
            if self.weights is not None and self.counts is not None:
                counts = dict(zip(COUNTS, self.counts[i].tolist(), strict=True))
                piece = replace(piece, weights=self.weights[span], counts=counts)
            yield int(self.draws[i]), piece

    def leaves_out(self) -> list[LeftOut]:
        return [LeftOut(**item) for item in json.loads(str(self.left_out))]

    def has_errors(self) -> bool:
        return any(item.is_error for item in self.leaves_out())

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored."""
        fields_and_values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in fields_and_values if value is not None}


@dataclass(frozen=True)
class UnitTokenizer:
    """Tokenizes units, and stores them in `folder`. encode: makes those fields of a `TokenUnit` that say no place.
    skip_errors: a stored unit without what could not be read is used. stopped: when it is set, no longer."""

    encode: Callable[[TextUnit, threading.Event], dict[str, np.ndarray]]
    folder: Path
    skip_errors: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)

    def __call__(self, unit: TextUnit) -> TokenUnit:
        """The unit's tokens, read from `folder` if they are stored there."""
        stored = load_unit(self.folder, unit.number)
        position = {
            "next_input": np.array(unit.next_input, np.int64),
            "text_end": np.array(unit.text_end, np.int64),
            "state": np.array(unit.state),
        }
        text = unit.text
        usable = stored is not None and str(stored.text) == text and (self.skip_errors or not stored.has_errors())
        if stored is None or not usable:
            tokenized = TokenUnit(**self.encode(unit, self.stopped), **position, text=np.array(text))
        elif str(stored.state) == unit.state:
            return stored
        else:
            tokenized = replace(stored, **position)
        if self.stopped.is_set():
            raise CancelledError
        _store_unit(self.folder, unit.number, tokenized)
        return tokenized


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizes documents into tokens of `dtype`."""

    tokenizer: Tokenizer
    dtype: str

    def __call__(self, unit: TextUnit, stopped: threading.Event) -> dict[str, np.ndarray]:
        encoded: list[np.ndarray] = []
        for batch in _encode_batches(unit.pieces):
            if stopped.is_set():
                raise CancelledError
            token_lists = self.tokenizer.encode_batch([piece.text for piece in batch])
            encoded += [tokens.astype(self.dtype) for tokens in token_lists]
        return {
            "tokens": np.concatenate([np.array([], self.dtype), *encoded]),
            "lengths": np.array([len(tokens) for tokens in encoded], np.int64),
            "text_bytes": np.array([len(piece.text.encode()) for piece in unit.pieces], np.int64),
            "begins": np.array([piece.begins for piece in unit.pieces], bool),
            "draws": np.array([draw(piece) for piece in unit.pieces], np.uint64),
            "left_out": np.array(json.dumps([asdict(item) for item in unit.left_out])),
        }


def tokenize_units(stream: TextStream, tokenize: UnitTokenizer, workers: Workers) -> Iterator[TokenUnit]:
    """The tokenized units of a stream, in order.

    Raises ConfigError: as `readers.read_pieces` does, or for text that the tokenizer cannot encode.
    """
    # Units from an interrupted run come first. Reading resumes at the last file boundary among them, so that files
    # which they cover completely are not read again.
    stored_count, resume_at = 0, (0, 0, 0)
    states = set(stream.states)
    while (stored := load_unit(tokenize.folder, stored_count)) is not None and str(stored.state) in states:
        if not stream.reading.skip_errors and stored.has_errors():
            break  # made by a run that skipped errors
        yield stored
        stored_count += 1
        if stored.next_input >= 0:
            resume_at = (stored_count, int(stored.next_input), int(stored.text_end))

    pending: deque[Future[TokenUnit]] = deque()
    for unit in cut_units(stream, *resume_at):
        if unit.number < stored_count:
            continue
        pending.append(workers.submit(tokenize, unit))
        if len(pending) > workers.count:  # bounds the units in memory
            yield workers.result(pending.popleft())
    while pending:
        yield workers.result(pending.popleft())


def cut_units(stream: TextStream, number: int = 0, first_input: int = 0, text_end: int = 0) -> Iterator[TextUnit]:
    """Cuts a stream of text into units.

    To resume: `number` is that of the first unit, which starts with input `first_input`, after `text_end` bytes.
    """
    unit: list[Piece] = []
    left_out: list[LeftOut] = []
    unit_bytes = 0

    def finish(next_input: int, state: str) -> TextUnit:
        nonlocal number, unit, left_out, unit_bytes
        finished = TextUnit(number, tuple(unit), tuple(left_out), next_input, text_end, state)
        number, unit, left_out, unit_bytes = number + 1, [], [], 0
        return finished

    for index in range(first_input, len(stream.inputs)):
        # The last unit of a file of several units ends with the file, so that a resumed run need not read the file
        # again to continue after it.
        spans_units, state = False, stream.states[index + 1]
        for piece in _pieces(stream, index, text_end):
            if isinstance(piece, LeftOut):
                add_left_out(left_out, piece)
                continue
            if unit_bytes >= UNIT_BYTES:
                yield finish(-1, state)
                spans_units = True
            piece_bytes = len(piece.text.encode())
            if stream.max_bytes and text_end + piece_bytes >= stream.max_bytes:
                piece = truncate_piece(piece, stream.max_bytes - text_end)
            if piece.text:
                unit.append(piece)
            unit_bytes, text_end = unit_bytes + piece_bytes, text_end + piece_bytes
            if stream.max_bytes and text_end >= stream.max_bytes:
                break
        if stream.max_bytes and text_end >= stream.max_bytes:
            break
        if unit and (spans_units or unit_bytes >= UNIT_BYTES):
            yield finish(index + 1, state)
    if unit or left_out:
        yield finish(len(stream.inputs), stream.states[-1])


def _pieces(stream: TextStream, index: int, offset: int) -> Iterator[Piece | LeftOut]:
    """What one of the files contains, divided if it is the document to divide. offset: the text before it."""
    for piece in read_pieces([stream.inputs[index]], stream.reading):
        if isinstance(piece, LeftOut) or not stream.division:
            yield piece
            continue
        yield from stream.division.divide(piece, offset)
        offset += len(piece.text.encode())


def add_left_out(left_out: list[LeftOut], item: LeftOut) -> None:
    """Lists an item, or counts it if enough are listed."""
    if len(left_out) <= LISTED:
        left_out.append(item)
    else:
        last = left_out[-1]
        left_out[-1] = LeftOut("and others", last.is_error or item.is_error, last.count + item.count)


def load_unit(folder: Path, number: int) -> TokenUnit | None:
    """A stored unit; None if there is none or it is damaged (each array has a checksum)."""
    file = _unit_file(folder, number)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return TokenUnit(**{name: arrays[name] for name in arrays.files})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        with contextlib.suppress(OSError):
            file.unlink()
        return None


def _store_unit(folder: Path, number: int, unit: TokenUnit) -> None:
    """Writes under a temporary name first: a unit that exists under its own name is complete."""
    file = _unit_file(folder, number)
    partial = file.with_suffix(".part")
    try:
        with open(partial, "wb") as stream:
            np.savez(stream, allow_pickle=False, **unit.arrays())
        os.replace(partial, file)
    except OSError:  # such as a full disk
        partial.unlink(missing_ok=True)
        raise


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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
