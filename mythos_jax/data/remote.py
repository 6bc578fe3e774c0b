"""Sources that are a URL (`hf://datasets/…`, `gs://…`, `s3://…`, whatever fsspec opens), read where they are."""

import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mythos_jax.data.input_file import InputFile, kind_left_out, one_line_path
from mythos_jax.data.storage import open_file_system
from mythos_jax.errors import ConfigError, StorageError, one_line
from mythos_jax.streams import log

TRIES, FIRST_PAUSE = 5, 1.0  # of a call that fails; seconds before the second one, twice as many before each other
_BLOCK = 8 << 20  # bytes that are read ahead
_LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, NotImplementedError)
_MISTAKES = (TypeError, ValueError, AttributeError, ImportError)  # such as a name that cannot be one
# What stores say that identifies the content of a file.
_VERSIONS = ("etag", "generation", "md5hash", "blob_id", "mtime", "lastmodified", "last_modified", "updated", "created")

Result = TypeVar("Result")


def find_remote(
    url: str, wanted: Callable[[Path], bool], is_prepared: Callable[[list[str]], bool]
) -> tuple[list[InputFile], Counter[str] | None]:
    """The files of a URL: of a file itself, of a folder those that are `wanted`, or, of a pattern such as
    `hf://datasets/a/b/data/*.parquet`, those that fit it. Of a folder also what is left out; else None.

    Raises ConfigError: no such thing. StorageError: the store does not answer.
    """
    files, path = open_file_system(url)
    try:
        wildcards = [path.index(character) for character in "*?[" if character in path]
        if wildcards and not _exists(url, files, path):
            folder = path[: min(wildcards)].rpartition("/")[0]
            found = asking(url, lambda: files.glob(path, detail=True)).values()
            named = {relative(info["name"], folder): info for info in found if info["type"] == "file"}
            if not named:
                raise FileNotFoundError
            return [_input(files, named[name], name, given=True) for name in sorted(named, key=_order)], None
        # A store's own name of the root may differ from the URL's: it has the revision, or no slash at the end.
        top = asking(url, lambda: files.info(path))
        if top["type"] == "file":
            return [_input(files, top, top["name"].rpartition("/")[2], given=True)], None
        infos = asking(url, lambda: list(files.find(path, detail=True).values()))
    except FileNotFoundError:
        raise ConfigError(f"source {one_line_path(url)}: no such file or folder") from None
    except PermissionError as error:
        raise ConfigError(f"source {one_line_path(url)}: cannot be read ({one_line(error, limit=200)})") from None
    named = {relative(info["name"], top["name"].rstrip("/")): info for info in infos}
    names, left_out = _read(list(named), wanted, is_prepared)
    return [_input(files, named[name], name, given=False) for name in names], left_out


def _exists(url: str, files: Any, path: str) -> bool:
    """Whether there is something with the name of a pattern, such as `a[1].jsonl`."""
    try:
        asking(url, lambda: files.info(path))
    except (FileNotFoundError, PermissionError, ConfigError):  # a store may have no such names
        return False
    return True


def _read(
    names: list[str], wanted: Callable[[Path], bool], is_prepared: Callable[[list[str]], bool]
) -> tuple[list[str], Counter[str]]:
    """Those of the files in a folder that are read, in the order that they have on a disk, and what is left out."""
    in_folder: dict[str, list[str]] = {}
    for name in names:
        folder, _, own = name.rpartition("/")
        in_folder.setdefault(folder, []).append(own)
    prepared = {f"{folder}/".lstrip("/") for folder, own_names in in_folder.items() if is_prepared(own_names)}
    left_out = Counter({"prepared folder": len(prepared)})
    read = []
    for name in sorted(names, key=_order):
        if name.startswith(tuple(prepared)):
            continue
        if any(part.startswith((".", "__pycache__")) for part in name.split("/")):
            left_out["hidden file"] += 1
        elif not wanted(Path(name)):
            left_out[kind_left_out(Path(name))] += 1
        else:
            read.append(name)
    return read, +left_out


def _order(name: str) -> list[tuple[bool, str]]:
    """Sorts names as folders on a disk are read: the files of a folder, then its subfolders."""
    *folders, own = name.split("/")
    return [*((True, folder) for folder in folders), (False, own)]


def open_remote(file: InputFile) -> BinaryIO:
    """The content of a file with a URL, as it is stored. Raises OSError if it is not there or may not be read, and
    StorageError, as reading does."""
    return io.BufferedReader(_RemoteFile(file.url), 1 << 20)


class _RemoteFile(io.RawIOBase):
    """Reads a file; what fails is opened again, at the same place."""

    def __init__(self, url: str):
        super().__init__()
        self._url, self._at = url, 0
        self._files, self._path = open_file_system(url)
        self._file: Any = None
        size: int | None = asking(url, self._open).size
        if size is None:
            self.close()
            raise OSError("its server does not say how long it is, or sends it only as a whole; download it first")
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._size - self._at, 0))
        content = asking(self._url, lambda: self._read(wanted)) if wanted else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _open(self) -> Any:
        self._file = self._files.open(self._path, "rb", block_size=_BLOCK)
        return self._file

    def _read(self, count: int) -> bytes:
        try:
            file = self._file or self._open()
            file.seek(self._at)
            content: bytes = file.read(count)
            if not content:
                raise OSError(f"the file ends at {self._at:,} of {self._size:,} bytes")
            return content
        except BaseException:
            self._file = None
            raise


def asking(url: str, call: Callable[[], Result], verb: str = "read", kind: str = "source ") -> Result:
    """What a call returns, which is made again if it fails. verb, kind: for messages, what it does to which URL.

    Raises FileNotFoundError and PermissionError at once, ConfigError for what is no trouble of a connection, and
    StorageError.
    """
    for number in range(TRIES):
        try:
            return call()
        except _LASTING:
            raise
        except Exception as error:
            problem = f"{one_line_path(url)}: cannot be {verb} ({one_line(error, limit=200) or type(error).__name__})"
            if isinstance(error, _MISTAKES) and not isinstance(error, OSError):
                raise ConfigError(f"{kind}{problem}") from None
            if number == TRIES - 1:
                raise StorageError(f"{problem}; the same command goes on from here") from None
            if number == 0:
                log(f"{problem}; trying again")
            time.sleep(FIRST_PAUSE * 2**number)
    raise AssertionError


def _input(files: Any, info: dict[str, Any], name: str, given: bool) -> InputFile:
    fields = {str(key).lower(): value for key, value in info.items()}
    version = [str(fields[key]) for key in _VERSIONS if fields.get(key)]
    modified = int.from_bytes(hashlib.sha256(str(version).encode()).digest()[:7], "big")
    size = int(info["size"] or 0)
    return InputFile(Path(info["name"]), name, size, modified, given, files.unstrip_protocol(info["name"]))


def relative(name: str, folder: str) -> str:
    """The name of a file in a folder, from there; the whole name if the store has another one for the folder."""
    return name.lstrip("/").removeprefix(f"{folder.strip('/')}/".lstrip("/"))
