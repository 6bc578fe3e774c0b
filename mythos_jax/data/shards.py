"""Where the rows of a split are in its files, and how a row proves to be the one that was asked for.

The rows of a split are divided in order over *shards*, which all have the same number of rows, but the last may have
fewer. A shard is an ArrayRecord file of records that have one length, are not compressed, and are a chunk each. So the
bytes of a row are a function of its number, and one range of the file; no index is needed.

A record is the row, zeros up to the length that all have, the row's own length, and a check: a hash of these and of the
row's number in the shard, whose key is the hash of all rows of the shard, which the manifest has. Other bytes, wherever
they come from (another row, another version of the file, half an answer), do not pass it.
"""

import hashlib
from dataclasses import dataclass

# ArrayRecord writes Riegeli files: blocks that begin with a header, wherever it falls; through them chunks of a header,
# the sizes of the records, and the records. The first chunk is empty and marks the file.
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
SHARD_BYTES = 1 << 30  # how large a file becomes, more or less
WRITER_OPTIONS = "group_size:1,uncompressed"

_LENGTH, _CHECK = 4, 8


def shard_name(split: str, number: int, count: int) -> str:
    """The file name of a shard of `count`."""
    return f"{split}-{number:05d}-of-{count:05d}.array_record"


def padded(row: bytes, row_bytes: int) -> bytes:
    """A record without its check. row_bytes: the length of the longest row."""
    return row.ljust(row_bytes, b"\0") + len(row).to_bytes(_LENGTH, "little")


def sealed(padded_row: bytes, number: int, key: bytes) -> bytes:
    """The record of row `number` of a shard. key: the sha256 of all padded rows of the shard."""
    return padded_row + _check(padded_row, number, key)


def unsealed(record: bytes, number: int, key: bytes) -> bytes:
    """The row in a record. Raises ValueError if the record is not that of row `number` of the shard."""
    content = record[:-_CHECK]
    if record[-_CHECK:] != _check(content, number, key):
        raise ValueError("it does not hold the row that the manifest was made with")
    return content[: int.from_bytes(content[-_LENGTH:], "little")]


def _check(padded_row: bytes, number: int, key: bytes) -> bytes:
    salt = number.to_bytes(8, "little")
    return hashlib.blake2b(padded_row, digest_size=_CHECK, key=key, salt=salt).digest()


@dataclass(frozen=True)
class Layout:
    """The places of records in a shard. row_bytes: the length of the longest row."""

    row_bytes: int

    @property
    def record_bytes(self) -> int:
        return self.row_bytes + _LENGTH + _CHECK

    @property
    def _before(self) -> int:
        """Bytes of a chunk before its record: the header, a byte for "not compressed", and the two sizes."""
        size = _varint_bytes(self.record_bytes)
        return _CHUNK_HEADER + 1 + _varint_bytes(size) + size

    @property
    def stride(self) -> int:
        """Bytes of a chunk."""
        return self._before + self.record_bytes

    def span(self, first: int, count: int) -> tuple[int, int]:
        """The bytes of the file, from and to, that hold `count` records from `first` on, with what is between them."""
        start = _CHUNK_HEADER + first * self.stride + self._before
        end = start + (count - 1) * self.stride + self.record_bytes
        return _place(start), _place(end - 1) + 1

    def records(self, content: bytes, first: int, count: int) -> list[bytes]:
        """The records in the bytes of a span."""
        start, _ = self.span(first, count)
        view, parts, at = memoryview(content), [], 0
        while at < len(content):
            to_block_end = _BLOCK - (start + at) % _BLOCK
            parts.append(view[at : at + to_block_end])
            at += to_block_end + _BLOCK_HEADER
        joined = b"".join(parts)
        starts = range(0, count * self.stride, self.stride)
        return [joined[start : start + self.record_bytes] for start in starts]


def _place(offset: int) -> int:
    """The position in the file of a byte that has `offset` others before it, block headers not counted."""
    block, rest = divmod(offset, _BLOCK - _BLOCK_HEADER)
    return block * _BLOCK + _BLOCK_HEADER + rest


def _varint_bytes(value: int) -> int:
    """The length of a number in base 128."""
    return max(-(-value.bit_length() // 7), 1)
