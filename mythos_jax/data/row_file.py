"""A file of records that is written once, in order, and read back before it counts.

`array_record` is imported where it is used: it is not built for every system, and `mythos_jax.data` must import on all.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mythos_jax.data.manifest import file_sha256
from mythos_jax.errors import ConfigError


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
    """Writes the rows of one split to an ArrayRecord file."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path, self.rows = path, 0
        self._content = hashlib.sha256()
        self._writer = ArrayRecordWriter(str(path), "group_size:1")  # 1: each row can be read by itself

    def write(self, record: bytes) -> None:
        self._content.update(record)
        self.rows += 1
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._write_error(error) from None

    def finish(self) -> tuple[str, int, str]:
        """Closes the file and reads it back. Returns the sha256 of its records, its size and its sha256.

        Raises ConfigError: the file cannot be written, or reads back differently.
        """
        self._close()
        self._read_back()
        return self._content.hexdigest(), self.path.stat().st_size, file_sha256(self.path)

    def abandon(self) -> None:
        """Closes the file after a failure. Raises nothing: the failure is the error to report."""
        with contextlib.suppress(RuntimeError):
            self._writer.close()

    def _close(self) -> None:
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._write_error(error) from None

    def _read_back(self) -> None:
        """Compares the file on disk with what was written. Raises ConfigError if they differ."""
        from array_record.python.array_record_module import ArrayRecordReader

        content, reader = hashlib.sha256(), ArrayRecordReader(str(self.path))
        count = reader.num_records()
        try:
            for start in range(0, count, 1024):
                for record in reader.read(start, min(start + 1024, count)):
                    content.update(record)
        except RuntimeError as error:
            raise ConfigError(f"{self.path}: cannot be read back ({first_part(error)})") from None
        if count != self.rows or content.digest() != self._content.digest():
            raise ConfigError(f"{self.path}: the rows read back differ from those written; is the disk faulty?")

    def _write_error(self, error: RuntimeError) -> ConfigError:
        return ConfigError(f"{self.path}: cannot be written ({first_part(error)})")


def first_part(error: RuntimeError) -> str:
    """What ArrayRecord says went wrong. "write() failed: No space left on device; writing PATH; at byte 0; …": the
    first part is enough."""
    return str(error).split(";")[0]
