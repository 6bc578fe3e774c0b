"""Which text is held out for evaluation.

A hash of a document's name decides, so the answer is the same on every machine and in every corpus. Where that leaves
one side empty, the document that is nearest to the other side changes over. The only document of a corpus is divided:
its last share is held out.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mythos_jax.data.input_file import InputFile
from mythos_jax.data.readers import LeftOut, Piece, Reading, read_pieces, truncate_piece
from mythos_jax.errors import ConfigError

DRAWS = 1 << 64


def draw(piece: Piece) -> int:
    """An integer in [0, `DRAWS`): the document is held out if it is below the held-out share of them."""
    if piece.held_out is not None:
        return 0 if piece.held_out else DRAWS - 1
    digest = hashlib.sha256(piece.name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out."""
    return draw(Piece(name, "")) < fraction * DRAWS


@dataclass(frozen=True)
class Division:
    """Where the only document of a corpus is divided: about `held_out` bytes before its end, at `start`."""

    name: str
    start: int  # in bytes from the start of the text
    held_out: int  # bytes

    def divide(self, piece: Piece, offset: int) -> Iterator[Piece]:
        """The parts of a piece that starts after `offset` bytes; two for the piece in which the document is divided."""
        data = piece.text.encode()
        start = self.start - offset
        if start >= len(data):
            yield replace(piece, held_out=False)
            return
        if start < 0:
            yield replace(piece, begins=False, held_out=True)
            return
        cut = self._cut(data, start, offset)
        if cut:
            yield Piece(piece.name, data[:cut].decode(), piece.begins, held_out=False)
        yield Piece(piece.name, data[cut:].decode(), True, held_out=True)

    def _cut(self, data: bytes, start: int, offset: int) -> int:
        """The start of the line that contains byte `start`, if that is near, else of the character."""
        line = data.rfind(b"\n", 0, start) + 1
        if line and start - line <= self.held_out:
            return line
        character = len(data[:start].decode(errors="ignore").encode())
        return character or (0 if offset else len(data.decode()[0].encode()))


def find_division(inputs: Sequence[InputFile], reading: Reading, max_bytes: int, fraction: float) -> Division | None:
    """How the text is divided if it is a single document; None if there are more, or nothing is held out.

    Reads no further than to the start of the second document.

    Raises ConfigError: a document of one character; text that cannot be read.
    """
    if not fraction:
        return None
    name, size, characters = "", 0, 0
    for piece in read_pieces(inputs, reading):
        if isinstance(piece, LeftOut):
            continue
        reached = size + len(piece.text.encode())
        if max_bytes:
            piece = truncate_piece(piece, max_bytes - size)
        if piece.begins and piece.text and size:
            return None
        name, size, characters = piece.name, size + len(piece.text.encode()), characters + len(piece.text)
        if max_bytes and reached >= max_bytes:
            break
    if not size:
        return None
    if characters < 2:
        raise ConfigError(
            f"held_out_fraction: got {fraction}, and the only document has one character, which cannot be divided; "
            "allowed: 0 to hold out nothing, or more text"
        )
    held_out = min(max(round(size * fraction), 1), size - 1)
    return Division(name, size - held_out, held_out)
