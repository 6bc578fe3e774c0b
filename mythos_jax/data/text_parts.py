"""Cuts text into parts and these into units, at places that depend on the text and its files alone.

The documents of all sources form one stream of text. A part is some consecutive files of it, about `UNIT_BYTES` of them
(but at most `PART_FILES` files), or one larger file. A part is cut into units of about `UNIT_BYTES` of text. Parts can
be read at the same time, also on many machines (prepare_beam.py).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from mythos_jax.data.input_file import InputFile
from mythos_jax.data.readers import LeftOut, Piece, Reading, read_pieces, truncate_piece
from mythos_jax.data.split import Division

UNIT_BYTES = 16 << 20  # UTF-8 text per unit
PART_FILES = 1 << 14  # at most, in a part: files may be empty, and some stores do not say how large they are
LISTED = 1000  # things left out that a unit lists; of more it keeps the number


@dataclass(frozen=True)
class TextPart:
    """Consecutive inputs. max_bytes: of their text to read; 0: all. division: of the only document that there is."""

    number: int
    inputs: tuple[InputFile, ...]
    reading: Reading = field(default_factory=Reading)
    max_bytes: int = 0
    division: Division | None = None

    @cached_property
    def state(self) -> str:
        """A hash of the current state of the files, and of how they are read."""
        files = [[file.name, file.location, file.size, file.modified, file.given] for file in self.inputs]
        options = [self.reading.text_column, self.max_bytes, self.division and asdict(self.division)]
        return hashlib.sha256(json.dumps([options, files]).encode()).hexdigest()


@dataclass(frozen=True)
class TextStream:
    """The text of `inputs`. max_bytes: of it to read; 0: all. division: of its only document, if it has no other."""

    inputs: Sequence[InputFile]
    reading: Reading = field(default_factory=Reading)
    max_bytes: int = 0
    division: Division | None = None

    def groups(self) -> Iterator[tuple[InputFile, ...]]:
        """The inputs of each part."""
        group: list[InputFile] = []
        size = 0
        for file in self.inputs:
            group.append(file)
            size += file.size
            if size >= UNIT_BYTES or len(group) == PART_FILES:
                yield tuple(group)
                group, size = [], 0
        if group:
            yield tuple(group)

    def part(self, number: int, inputs: tuple[InputFile, ...], text_before: int) -> TextPart | None:
        """A part, before which the stream has this many bytes of text; None if no more is to be read."""
        left = self.max_bytes - text_before if self.max_bytes else 0
        return None if self.max_bytes and left <= 0 else TextPart(number, inputs, self.reading, left, self.division)


@dataclass(frozen=True)
class TextUnit:
    """Consecutive pieces of text, to be tokenized together.

    part, number: of the part, and of the unit in it. left_out: what is left out between the pieces. last: whether the
    part ends with it. text_end: bytes of text from the start of the part to the end of the unit. state: of the part.
    """

    part: int
    number: int
    pieces: tuple[Piece, ...]
    left_out: tuple[LeftOut, ...]
    last: bool
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


def cut_units(part: TextPart) -> Iterator[TextUnit]:
    """Cuts a part into units; into one without text if it has none.

    Raises ConfigError as `readers.read_pieces` does.
    """
    unit: list[Piece] = []
    left_out: list[LeftOut] = []
    number = unit_bytes = text_end = 0

    def finish(last: bool) -> TextUnit:
        nonlocal number, unit, left_out, unit_bytes
        finished = TextUnit(part.number, number, tuple(unit), tuple(left_out), last, text_end, part.state)
        number, unit, left_out, unit_bytes = number + 1, [], [], 0
        return finished

    for piece in _pieces(part):
        if isinstance(piece, LeftOut):
            add_left_out(left_out, piece)
            continue
        if unit_bytes >= UNIT_BYTES:
            yield finish(last=False)
        piece_bytes = len(piece.text.encode())
        if part.max_bytes and text_end + piece_bytes >= part.max_bytes:
            piece = truncate_piece(piece, part.max_bytes - text_end)
        if piece.text:
            unit.append(piece)
        unit_bytes, text_end = unit_bytes + piece_bytes, text_end + piece_bytes
        if part.max_bytes and text_end >= part.max_bytes:
            break
    yield finish(last=True)


def text_bytes(part: TextPart) -> int:
    """Bytes of text in a part; once they reach `max_bytes`, no more are read. Raises as `cut_units` does."""
    size = 0
    for piece in read_pieces(part.inputs, part.reading):
        if not isinstance(piece, LeftOut):
            size += len(piece.text.encode())
            if part.max_bytes and size >= part.max_bytes:
                break
    return size


def _pieces(part: TextPart) -> Iterator[Piece | LeftOut]:
    """What the files contain, divided if it is the document to divide: there is no other text, so before it is none."""
    offset = 0
    for piece in read_pieces(part.inputs, part.reading):
        if isinstance(piece, LeftOut) or not part.division:
            yield piece
            continue
        yield from part.division.divide(piece, offset)
        offset += len(piece.text.encode())


def add_left_out(left_out: list[LeftOut], item: LeftOut) -> None:
    """Lists an item, or counts it if enough are listed."""
    if len(left_out) <= LISTED:
        left_out.append(item)
    else:
        last = left_out[-1]
        left_out[-1] = LeftOut("and others", last.is_error or item.is_error, last.count + item.count)
