"""Reads the stored rows of a split by number: from shards, or from the one file of a folder of version 1."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mythos_jax.data.manifest import ROWS_AT_FILE, Manifest, check_folder_name
from mythos_jax.data.row_file import first_part
from mythos_jax.data.shards import Layout, shard_name, unsealed
from mythos_jax.data.storage import Part, Storage, WrongBytesError
from mythos_jax.errors import ConfigError

CACHE_BYTES = 256 << 20  # of rows from an object store that this process keeps
_RUN_BYTES = 8 << 20  # of neighbouring rows that are read at once
_ROWS_AT_ONCE = 4096  # of all rows
_OVERHEAD = 256  # bytes that an entry of the cache takes besides the row


class StoredRows(Protocol):
    """The rows of a split as bytes. Safe to share between threads. remote: whether they are in an object store."""

    @property
    def remote(self) -> bool: ...

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Rows by number. Raises ConfigError naming file and row if one is damaged, and StorageError."""
        ...

    def place(self, number: int) -> str:
        """What messages call a row: its file and its number there."""
        ...

    def close(self) -> None: ...


def open_stored_rows(folder: str | Path, split: str, manifest: Manifest, patient: bool = True) -> StoredRows:
    """The rows of a split of a prepared folder. patient: as of `Storage`. Raises ConfigError if its file is damaged."""
    if manifest.version == 1:
        return OneFile(Path(folder) / f"{split}.array_record", manifest.splits[split].rows)
    return Shards(folder, split, manifest, patient)


def all_rows(rows: StoredRows, count: int) -> Iterator[bytes]:
    """All rows of a split in order, which are closed after that."""
    try:
        for first in range(0, count, _ROWS_AT_ONCE):
            yield from rows.read(range(first, min(first + _ROWS_AT_ONCE, count)))
    finally:
        rows.close()


class Shards:
    """Rows in shards. Those of an object store are kept up to `CACHE_BYTES`, so that small data is read once."""

    def __init__(self, folder: str | Path, split: str, manifest: Manifest, patient: bool = True):
        pointer = Path(folder) / ROWS_AT_FILE
        rows_at = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else folder
        self.storage = Storage(rows_at, patient)
        found = manifest.splits[split]
        self._layout, self._shards, self._split = Layout(found.row_bytes), found.shards, split
        self._keys = [bytes.fromhex(shard.content) for shard in found.shards]

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        found = _cache.get([self._name(n) for n in numbers]) if self.remote else {}
        rows = {n: row for n in numbers if (row := found.get(self._name(n))) is not None}
        runs = self._runs(sorted({n for n in numbers if n not in rows}))
        for run, content in zip(runs, self.storage.read([self._part(run) for run in runs]), strict=True):
            rows |= zip(run, content, strict=True)
            if self.remote:
                _cache.put({self._name(n): rows[n] for n in run})
        return [rows[n] for n in numbers]

    def place(self, number: int) -> str:
        return f"{self.storage.folder}/{self._file(number)}, row {self._in_shard(number)}"

    @property
    def remote(self) -> bool:
        return self.storage.remote

    def close(self) -> None:
        self.storage.close()

    def _name(self, number: int) -> tuple[bytes, int]:
        """What the cache calls a row."""
        return self._key(number), self._in_shard(number)

    def _key(self, number: int) -> bytes:
        return self._keys[number // self._shards[0].rows]

    def _in_shard(self, number: int) -> int:
        return number % self._shards[0].rows

    def _file(self, number: int) -> str:
        return shard_name(self._split, number // self._shards[0].rows, len(self._shards))

    def _runs(self, numbers: list[int]) -> list[range]:
        """Divides sorted numbers into neighbours in the same shard."""
        most = max(_RUN_BYTES // self._layout.stride, 1)
        runs: list[range] = []
        for n in numbers:
            if runs and n == runs[-1].stop and self._in_shard(n) and len(runs[-1]) < most:
                runs[-1] = range(runs[-1].start, n + 1)
            else:
                runs.append(range(n, n + 1))
        return runs

    def _part(self, run: range) -> Part:
        first, key = self._in_shard(run.start), self._key(run.start)
        start, end = self._layout.span(first, len(run))

        def parse(content: bytes) -> list[bytes]:
            rows = []
            for i, record in enumerate(self._layout.records(content, first, len(run)), start=first):
                try:
                    rows.append(unsealed(record, i, key))
                except ValueError as error:
                    raise WrongBytesError(f"row {i}: damaged ({error}); prepare the folder again") from None
            return rows

        return Part(self._file(run.start), start, end, parse)


class OneFile:
    """Rows of a folder of version 1: a compressed file, read by ArrayRecord's own reader."""

    remote = False

    def __init__(self, path: Path, rows: int):
        from array_record.python.array_record_module import ArrayRecordReader

        check_folder_name(path)
        self._path = path
        # Rows are read in random order, so reading ahead would be wasted.
        self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        # The reader does not raise for a damaged file: it reports 0 records and returns b"" for each.
        if (found := self._reader.num_records()) != rows:
            raise ConfigError(f"{path}: damaged, got {found} rows, the manifest says {rows}; prepare the folder again")

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        if not numbers:  # the reader takes an empty list to mean the whole file
            return []
        try:
            return self._reader.read(numbers)
        except RuntimeError:
            for number in numbers:  # the error does not say which row it was
                try:
                    self._reader.read([number])
                except RuntimeError as error:
                    reason = f"damaged ({first_part(error)}); prepare the folder again"
                    raise ConfigError(f"{self.place(number)}: {reason}") from None
            raise

    def place(self, number: int) -> str:
        return f"{self._path}, row {number}"

    def close(self) -> None:
        pass


class _Cache:
    """The rows that were used last, by the key of their shard and their number in it."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, names: Sequence[tuple[bytes, int]]) -> dict[tuple[bytes, int], bytes]:
        with self._lock:
            found = {name: self._rows[name] for name in names if name in self._rows}
            for name in found:
                self._rows.move_to_end(name)
        return found

    def put(self, rows: dict[tuple[bytes, int], bytes]) -> None:
        with self._lock:
            for name, row in rows.items():
                if name not in self._rows:
                    self._bytes += len(row) + _OVERHEAD
                self._rows[name] = row
            while self._bytes > CACHE_BYTES:
                _, row = self._rows.popitem(last=False)
                self._bytes -= len(row) + _OVERHEAD


_cache = _Cache()
