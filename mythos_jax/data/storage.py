"""Reads parts of the files of one folder, on a disk, in a mounted bucket or in an object store, patiently.

Every read is a call in a thread of its own, which may fail, or never return. It is then made again, less and less
often, until it succeeds or the storage has stayed away for too long.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_jax.calls import Call
from mythos_jax.errors import ConfigError, StorageError, one_line
from mythos_jax.paths import is_remote
from mythos_jax.processes import process_prefix
from mythos_jax.streams import log

PATIENCE = 600.0  # seconds that the storage may stay away while rows are read
OPEN_PATIENCE = 60.0  # while a folder is opened: its name or the permission may be wrong
STALL = 30.0  # seconds after which a call that has not returned is made again
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # between calls
# A missing file or wrong content, which the storage will not mend, in this many calls one after the other ...
LASTING_TRIES = 3
LASTING_PATIENCE = 60.0  # ... and, once rows are read, for this many seconds: passing trouble may look like that
CONCURRENT = 32  # calls at once to an object store
QUIET = 60.0  # seconds after a line about reads that fail in which there is no other
# What fsspec needs besides.
_PACKAGES = {
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp requests"),
}
_FILE = "file_in_folder"  # the attribute of an error that says which file it is about
_WAKE = 0.2  # how often one who waits looks whether the rows are still wanted


class WrongBytesError(Exception):
    """The bytes of a part are not what they should be, or too few."""


class MissingError(ConfigError):
    """A file, or the folder, is not there."""


_LASTING = (FileNotFoundError, IsADirectoryError, PermissionError, WrongBytesError)


@dataclass(frozen=True)
class Part:
    """A part of a file of the folder: its bytes from `start` up to `end`, and what becomes of them. parse: raises
    WrongBytesError for bytes that are not what they should be."""

    file: str
    start: int
    end: int
    parse: Callable[[bytes], Any] = bytes


class Storage:
    """The files of a folder. Safe to share between threads. patient: whether its rows are worth as long a wait as a run
    is; else all reads have the patience of opening. bytes_read: of the parts that have been read."""

    def __init__(self, folder: str | Path, patient: bool = True):
        self.folder, self.remote, self.bytes_read = str(folder), is_remote(folder), 0
        self._patient = patient
        self._files: Any = None  # the file system of an object store
        self._root = self.folder
        if self.remote:
            self._files, self._root = open_file_system(self.folder)
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._failing, self._said_at = 0, -QUIET  # reads that are tried again; when that was said last
        self._failing_since: float | None = None

    def close(self) -> None:
        """Ends all that waits; nothing can be read after that."""
        self._closed.set()

    def sizes(self) -> dict[str, int]:
        """The names of the files in the folder, and their sizes. Raises as `read` does."""
        return self._patiently("the folder", self._list, opening=True)

    def read(self, parts: Sequence[Part], opening: bool = False) -> list[Any]:
        """What the parts hold, each as its `parse` returns it. opening: with less patience.

        Raises ConfigError: a file is missing (MissingError), or ends too early, or `parse` refuses what it holds.
        StorageError: the storage stays away.
        """
        # One call reads all parts from a disk, where a thread for each would take longer than the reading.
        groups = [[part] for part in parts] if self.remote or not parts else [list(parts)]
        found: list[Any] = []
        for start in range(0, len(groups), CONCURRENT):
            work = [self._reading(group) for group in groups[start : start + CONCURRENT]]
            calls = [Call(one) for one in work]
            for group, one, call in zip(groups[start:], work, calls, strict=False):
                found += self._patiently(group[0].file, one, opening, call)
        return found

    def _reading(self, parts: list[Part]) -> Callable[[], list[Any]]:
        def read(part: Part) -> Any:
            try:
                return part.parse(self._bytes(part))
            except Exception as error:
                setattr(error, _FILE, part.file)
                raise

        return lambda: [read(part) for part in parts]

    def _bytes(self, part: Part) -> bytes:
        path = f"{self._root}/{part.file}"
        if self._files is not None:
            content = self._files.cat_file(path, start=part.start, end=part.end)
        else:
            content = self._local_bytes(path, part)
        if len(content) != part.end - part.start:
            raise WrongBytesError(f"got {len(content)} of {part.end - part.start} bytes from {part.start} on")
        with self._lock:
            self.bytes_read += len(content)
        return content

    def _local_bytes(self, path: str, part: Part) -> bytes:
        try:
            with open(path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), part.end - part.start, part.start)
        except FileNotFoundError:
            if not os.path.isdir(self._root) or not os.listdir(self._root):  # a mounted bucket that is gone
                raise OSError("the folder is not there, or empty") from None
            raise

    def _list(self) -> dict[str, int]:
        if self._files is None:
            with os.scandir(self._root) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        self._files.invalidate_cache()
        entries = self._files.ls(self._root, detail=True)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    def _patiently(self, what: str, work: Callable[[], Any], opening: bool, call: Call | None = None) -> Any:
        """The result of `work`, of which `call` may be the first call already."""
        patience, lasting_patience = (PATIENCE, LASTING_PATIENCE)
        if opening or not self._patient:
            patience, lasting_patience = OPEN_PATIENCE, 0.0
        begin, tries, pause = time.monotonic(), 0, FIRST_PAUSE
        lasting, since = 0, begin  # the number of lasting errors after the last other one; the time of the first
        try:
            while True:
                call = call or Call(work)
                self._wait(STALL, call.ended)
                if call.succeeded:
                    return call.result
                error = call.error or TimeoutError(f"no answer in {STALL:g} s")
                tries, now = tries + 1, time.monotonic()
                lasting = lasting + 1 if isinstance(error, _LASTING) else 0
                since = now if lasting <= 1 else since
                reason = one_line(error, limit=200) or type(error).__name__
                place = f"{self.folder}: {getattr(error, _FILE, what)}"
                if lasting >= LASTING_TRIES and now - since >= lasting_patience:
                    if isinstance(error, FileNotFoundError):
                        raise MissingError(f"{place}: missing")
                    raise ConfigError(f"{place}: {reason}")
                if now - begin > patience and tries >= LASTING_TRIES:  # this process may have been suspended meanwhile
                    raise StorageError(f"{place}: cannot be read for {patience:g} s ({reason}); is the storage there?")
                if tries == 1:
                    self._begins_to_fail(f"{place}: cannot be read ({reason}); trying again for up to {patience:g} s")
                self._wait(pause * (0.5 + random.random()))
                pause, call = min(pause * 2, LONGEST_PAUSE), None
        finally:
            if tries:
                self._ends_to_fail(call is not None and call.succeeded)

    def _wait(self, seconds: float, ended: threading.Event | None = None) -> None:
        """Until a call has ended, or the time is over. Raises StorageError when nobody wants the rows any more."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._closed.is_set():
            if (ended or self._closed).wait(min(_WAKE, left)):
                break
        if self._closed.is_set():
            raise StorageError(f"{self.folder}: closed")

    def _begins_to_fail(self, text: str) -> None:
        """Says it, unless the same was said of another read not long ago."""
        with self._lock:
            self._failing += 1
            now = time.monotonic()
            if self._failing > 1 or now - self._said_at < QUIET:
                return
            self._said_at = self._failing_since = now
        log(f"{process_prefix()}{text}")

    def _ends_to_fail(self, succeeded: bool) -> None:
        with self._lock:
            self._failing -= 1
            since = self._failing_since
            if self._failing or since is None or not succeeded:
                return
            self._failing_since = None
        lasted = time.monotonic() - since
        log(f"{process_prefix()}{self.folder}: no read is failing any more, after {lasted:.1f} s")


def open_file_system(url: str) -> tuple[Any, str]:
    """The file system of an object store (fsspec), and the path in it. Raises ConfigError."""
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(url.partition("://")[0])
        remedy = f"; pip install {package}" if package else ""
        raise ConfigError(f"{url}: cannot be opened ({one_line(error)}){remedy}") from None
    except ValueError as error:
        raise ConfigError(f"{url}: cannot be opened ({one_line(error)})") from None
    return files, path
