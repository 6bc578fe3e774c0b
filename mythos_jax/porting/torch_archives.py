"""The two containers that `torch.save` has written: a zip archive, and before PyTorch 1.6 a row of pickles.

Both hold one pickle, which names the storages of its tensors, and the bytes of each storage.
"""

import io
import math
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.porting.pickles import unpickle
from mythos_jax.porting.torch_objects import StoredTensor, TorchObjects

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of an old file


# What `zipfile` raises for records that are damaged, encrypted, or compressed in a way that it does not know.
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


class Archive(ABC):
    """What `torch.save` wrote: `value` is the saved object, with `Inert`s and `StoredTensor`s in it.

    label: names it in errors. Raises ConfigError: damaged, or not such a file.
    """

    value: Any

    def __init__(self, file: BinaryIO, label: str | Path):
        self.file, self.label = file, label
        self._last_record: tuple[str, bytes] | None = None
        self._objects = TorchObjects()

    def read(self, name: str, tensor: StoredTensor) -> np.ndarray:
        """A tensor, which errors call `name`. Only its storage is held in memory."""
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, tensor.dtype)
        record, element_bytes = self._record(tensor.storage), tensor.dtype.itemsize
        storage = np.frombuffer(record, f"V{element_bytes}", len(record) // element_bytes)  # as_strided knows no float8
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        if last >= storage.size:  # as_strided would read memory that does not belong to the file
            raise self._damaged(f"{name} extends beyond its storage")
        strides = [stride * element_bytes for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)
        return view.view(tensor.dtype)

    def _record(self, storage: str) -> bytes:
        """The bytes of a storage. The last one is kept, since tensors that share a storage follow each other."""
        if self._last_record is not None and self._last_record[0] == storage:
            return self._last_record[1]
        self._last_record = None  # frees its memory before the next storage is read
        try:
            record = self._read_record(storage)
        except (KeyError, *UNREADABLE, OSError) as error:
            raise self._damaged(f"storage {storage}: {error}") from None
        self._last_record = storage, record
        return record

    @abstractmethod
    def _read_record(self, storage: str) -> bytes: ...

    def _unpickle(self, file: BinaryIO) -> Any:
        try:
            return unpickle(file, self._objects.call, self._objects.persistent)
        except Exception as error:  # a malformed pickle can raise anything
            text = one_line(error, 200)
            raise ConfigError(f"{self.label}: its pickle cannot be read ({type(error).__name__}: {text})") from None

    def _big_endian(self) -> ConfigError:
        return ConfigError(f"{self.label}: stored big-endian; load and save it again on a little-endian machine")

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError(f"{self.label}: damaged checkpoint ({what})")


class ZipArchive(Archive):
    """One folder with `data.pkl` and a record `data/KEY` for each storage."""

    def __init__(self, file: BinaryIO, label: str | Path):
        super().__init__(file, label)
        try:
            self._zip = zipfile.ZipFile(file)
            for info in self._zip.infolist():
                if info.CRC == 0:  # written without checksums, as `set_crc32_options(False)` asks for
                    del info.CRC
            self._root = self._find_root()
            pickled = self._zip.read(f"{self._root}data.pkl")
        except UNREADABLE as error:
            if isinstance(error, ConfigError):
                raise
            raise self._damaged(one_line(error)) from None
        self.value = self._unpickle(io.BytesIO(pickled))

    def _find_root(self) -> str:
        """The folder inside the archive that holds everything."""
        names = self._zip.namelist()
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ConfigError(f"{self.label}: a zip file, but not a PyTorch checkpoint (no data.pkl)")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in names:
            command = resave(self.label, "x.state_dict()", load="torch.jit.load")
            raise ConfigError(f"{self.label}: a TorchScript archive, allowed: its tensors: {command}")
        byteorder = f"{root}byteorder"
        if byteorder in names and self._zip.read(byteorder).strip() != b"little":
            raise self._big_endian()
        return root

    def _read_record(self, storage: str) -> bytes:
        return self._zip.read(f"{self._root}data/{storage}")


class OldArchive(Archive):
    """Five pickles (a magic number, a version, the machine, the object, the order of its storages), then storages, each
    after its number of elements."""

    def __init__(self, file: BinaryIO, label: str | Path):
        super().__init__(file, label)
        if not self._has_magic() or self._unpickle(file) != PROTOCOL:
            raise ConfigError(f"{self.label}: a pickle, but not a PyTorch checkpoint; allowed: what torch.save writes")
        machine = self._unpickle(file)
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise self._big_endian()
        self.value = self._unpickle(file)
        keys = self._unpickle(file)
        plain = isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
        if not plain or not {str(key) for key in keys} <= self._objects.storages.keys():
            raise self._damaged("no list of its storages")
        self._places: dict[str, tuple[int, int]] = {}  # where the bytes of each storage start, and how many there are
        place = file.tell()
        for key in map(str, keys):
            size = self._objects.storages[key].length * self._objects.storages[key].element_bytes
            self._places[key] = place + 8, size
            place += 8 + size
        if place > file.seek(0, io.SEEK_END):
            raise self._damaged("truncated")

    def _has_magic(self) -> bool:
        try:
            return bool(self._unpickle(self.file) == MAGIC)
        except ConfigError:
            return False

    def _read_record(self, storage: str) -> bytes:
        start, size = self._places[storage]
        self.file.seek(start)
        return self.file.read(size)


def open_archive(path: Path) -> Archive:
    """The archive at `path`. Raises ConfigError."""
    try:
        file = path.open("rb")
        try:
            return _open(file, path)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open(file: BinaryIO, path: Path) -> Archive:
    head = file.read(4)
    file.seek(0)
    if head == ZIP:
        return ZipArchive(file, path)
    if head[:1] == PICKLE:
        return OldArchive(file, path)
    if head[:2] == ZIP[:2]:
        raise ConfigError(f"{path}: damaged checkpoint (a truncated zip file)")
    raise ConfigError(f"{path}: not a PyTorch checkpoint")


def resave(label: str | Path, expression: str, load: str = "torch.load") -> str:
    """The command that saves a part of a checkpoint anew, with PyTorch and whatever else the file needs.

    expression: of `x`, the loaded object.
    """
    options = ", weights_only=False" if load == "torch.load" else ""
    code = f"import torch; x = {load}({str(label)!r}, map_location='cpu'{options}); torch.save({expression}, 'out.pt')"
    return f'python -c "{code}"'
