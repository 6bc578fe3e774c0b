"""The files of one split (shards.py): written once, in order, and read back before they count.

`array_record` is imported where it is used: it is not built for every system, and `mythos_jax.data` must import on all.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mythos_jax.data.manifest import Shard, check_folder_name, file_sha256, shards_sha256
from mythos_jax.data.shards import SHARD_BYTES, WRITER_OPTIONS, Layout, padded, sealed, shard_name, unsealed
from mythos_jax.errors import ConfigError

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class TokenPiece:
    """What a writer of rows adds: the tokens of a document, or of a part of one (`begins`: the first); or a sample of a
    conversation, which also has weights, float32, of each token, and `manifest.COUNTS`."""

    tokens: np.ndarray
    text_bytes: int
    begins: bool
    weights: np.ndarray = field(default_factory=lambda: np.array([], np.float32))
    counts: Mapping[str, int] = field(default_factory=dict)


class RowFile:
    """Writes the rows of one split. row_bytes: of the longest row. shard_bytes: how large a file may become, more or
    less.

    The key of a shard's checks is known when its last row is. Until then its rows are in a plain file, `SPLIT.rows`.
    """

    def __init__(self, folder: Path, split: str, row_bytes: int, shard_bytes: int = SHARD_BYTES):
        check_folder_name(folder)
        self.folder, self.split, self.layout, self.rows = folder, split, Layout(row_bytes), 0
        self.shard_rows = max(shard_bytes // self.layout.stride, 1)
        self._content, self._of_shard = hashlib.sha256(), hashlib.sha256()
        self._in_shard = 0
        self._shards: list[Shard] = []
        self._plain = (folder / f"{split}.rows").open("w+b")

    def write(self, row: bytes) -> None:
        if self._in_shard == self.shard_rows:
            self._write_shard()
        record = padded(row, self.layout.row_bytes)
        self._content.update(row)
        self._of_shard.update(record)
        self._plain.write(record)
        self.rows += 1
        self._in_shard += 1

    def finish(self) -> dict[str, Any]:
        """Writes the last shard, and gives all of them their names. Returns what `Split` says of the files.

        Raises ConfigError: a file cannot be written, or reads back differently.
        """
        if self._in_shard:
            self._write_shard()
        self.abandon()
        for number in range(len(self._shards)):
            self._path(number).rename(self.folder / shard_name(self.split, number, len(self._shards)))
        return {
            "rows": self.rows,
            "content": self._content.hexdigest(),
            "file_bytes": sum(shard.file_bytes for shard in self._shards),
            "sha256": shards_sha256(self._shards),
            "row_bytes": self.layout.row_bytes,
            "shards": tuple(self._shards),
        }

    def abandon(self) -> None:
        """Deletes the plain file. Raises nothing: after a failure, that is the error to report."""
        with contextlib.suppress(OSError):
            self._plain.close()
            Path(self._plain.name).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}.array_record"

    def _write_shard(self) -> None:
        path, key = self._path(len(self._shards)), self._of_shard.digest()
        self._plain.seek(0)
        self._write_records(path, key)
        self._read_back(path, key)
        self._shards.append(Shard(self._in_shard, key.hex(), path.stat().st_size, file_sha256(path)))
        self._plain.seek(0)
        self._plain.truncate()
        self._in_shard, self._of_shard = 0, hashlib.sha256()

    def _write_records(self, path: Path, key: bytes) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer, size = ArrayRecordWriter(str(path), WRITER_OPTIONS), len(padded(b"", self.layout.row_bytes))
        try:
            for number in range(self._in_shard):
                writer.write(sealed(self._plain.read(size), number, key))
            writer.close()
        except RuntimeError as error:
            raise ConfigError(f"{path}: cannot be written ({first_part(error)})") from None
        finally:
            with contextlib.suppress(RuntimeError):  # closes it after an error
                writer.close()

    def _read_back(self, path: Path, key: bytes) -> None:
        """Compares the file on disk with what was written. Raises ConfigError if they differ."""
        content = hashlib.sha256()
        try:
            with path.open("rb") as file:
                for first in range(0, self._in_shard, _ROWS_AT_ONCE):
                    count = min(_ROWS_AT_ONCE, self._in_shard - first)
                    start, end = self.layout.span(first, count)
                    file.seek(start)
                    for i, record in enumerate(self.layout.records(file.read(end - start), first, count)):
                        content.update(padded(unsealed(record, first + i, key), self.layout.row_bytes))
        except ValueError:
            pass
        if content.digest() != key:
            raise ConfigError(f"{path}: the rows read back differ from those written; is the disk faulty?")


def first_part(error: RuntimeError) -> str:
    """What ArrayRecord says went wrong. "write() failed: No space left on device; writing PATH; at byte 0; …": the
    first part is enough."""
    return str(error).split(";")[0]
