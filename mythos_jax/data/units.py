"""Tokenizes text in units: in parallel, and kept on disk so that a `prepare` that was stopped resumes where it was.

Text is cut into units at places that depend on it alone (text_parts.py). Threads tokenize units (the tokenizer releases
Python's lock), write each to `PPPPPP-NNNNNN.npz` (its part, and its number in it) atomically, and yield them in order.
The tokens therefore depend neither on the number of threads nor on interruptions, and only a few units are in memory at
a time.

A stored unit knows the hash of its text and that of the files of its part. While these files are as they were, it is
used without reading them; if they have changed, they are read, and it is used if its text is the same.
"""

import contextlib
import io
import itertools
import json
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np

from mythos_jax.data.manifest import COUNTS
from mythos_jax.data.readers import LeftOut, Piece
from mythos_jax.data.row_file import TokenPiece
from mythos_jax.data.split import draw
from mythos_jax.data.text_parts import TextPart, TextStream, TextUnit, cut_units
from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.data.work_files import WorkFiles
from mythos_jax.data.workers import Workers

ENCODE_BYTES = 1 << 20  # text per call of the tokenizer


@dataclass(frozen=True)
class TokenUnit:
    """A tokenized unit of n pieces; of conversations, n samples. The field names are keys in the .npz file, where
    `last` and `text_end` (see `TextUnit`) are a bool and an int64 scalar, `state` and `text` hashes as ASCII text, and
    `left_out` JSON."""

    tokens: np.ndarray  # of all pieces, in the dtype of the rows
    lengths: np.ndarray  # int64 [n]: tokens per piece
    text_bytes: np.ndarray  # int64 [n]: UTF-8 bytes per piece
    begins: np.ndarray  # bool [n]: whether a document starts with the piece
    draws: np.ndarray  # uint64 [n]: decides whether the document is held out (see `split.draw`)
    last: np.ndarray
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
    """Tokenizes units, and stores them in the folder `files`. encode: makes those fields of a `TokenUnit` that say no
    place. skip_errors: a stored unit without what could not be read is used. stopped: when it is set, no longer."""

    encode: Callable[[TextUnit, threading.Event], dict[str, np.ndarray]]
    files: WorkFiles
    skip_errors: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)

    def __call__(self, unit: TextUnit) -> TokenUnit:
        """The unit's tokens, read from the folder if they are stored there."""
        stored = load_unit(self.files, unit.part, unit.number)
        position = {
            "last": np.array(unit.last),
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
        if unit.pieces or unit.left_out:
            _store_unit(self.files, unit.part, unit.number, tokenized)
        return tokenized

    def stored(self, part: TextPart) -> Iterator[TokenUnit]:
        """The first units of a part, as far as they are stored and its files are as they were."""
        for number in itertools.count():
            stored = load_unit(self.files, part.number, number)
            if stored is None or str(stored.state) != part.state:
                return
            if not self.skip_errors and stored.has_errors():
                return  # made by a run that skipped errors
            yield stored
            if stored.last:
                return


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
    pending: deque[Future[TokenUnit]] = deque()
    text_before = 0
    for number, inputs in enumerate(stream.groups()):
        part = stream.part(number, inputs, text_before)
        if part is None:
            break
        # Units from an interrupted run come first; a part that they cover completely is not read again.
        count, complete, text_end = 0, False, 0
        for stored in tokenize.stored(part):
            while pending:
                yield workers.result(pending.popleft())
            yield stored
            count, complete, text_end = count + 1, bool(stored.last), int(stored.text_end)
        for unit in () if complete else cut_units(part):
            text_end = unit.text_end
            if unit.number < count:
                continue
            pending.append(workers.submit(tokenize, unit))
            if len(pending) > workers.count:  # bounds the units in memory
                yield workers.result(pending.popleft())
        text_before += text_end
    while pending:
        yield workers.result(pending.popleft())


def load_unit(files: WorkFiles, part: int, number: int) -> TokenUnit | None:
    """A stored unit; None if there is none or it is damaged (each array has a checksum)."""
    name = _unit_file(part, number)
    content = files.read(name)
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return TokenUnit(**{name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        with contextlib.suppress(OSError):
            files.delete(name)
        return None


def _store_unit(files: WorkFiles, part: int, number: int, unit: TokenUnit) -> None:
    """Raises OSError, such as for a full disk."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **unit.arrays())
    files.write(_unit_file(part, number), content.getvalue())


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


def _unit_file(part: int, number: int) -> str:
    return f"{part:06}-{number:06}.npz"
