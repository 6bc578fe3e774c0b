"""PyTorch checkpoints (`.pt`, `.bin`), read without PyTorch and without executing anything they contain.

A checkpoint is a zip archive of one pickle and one raw record per storage. The unpickler below accepts plain
containers, tensors, and the config dataclass that OpenMythos's trainer saves, whose fields it puts into an inert
placeholder. Any other global is refused by name before anything is called.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mythos_jax.errors import ConfigError

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
CONFIG_CLASS = ("open_mythos.main", "MythosConfig")
CONFIG_KEYS = ("cfg", "config")
STATE_DICT_KEYS = ("model", "model_state_dict", "state_dict")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in the file: a strided view of one storage. Offset and strides count elements."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    length: int


class TorchFile:
    """The tensors of one checkpoint by name, and in `fields` the config that was saved with them, if any.

    The state dict is the whole checkpoint or its entry "model", "model_state_dict" or "state_dict". Raises
    ConfigError: not a checkpoint, damaged, or with a global that is not plain data.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._last_record: tuple[str, bytes] | None = None
        try:
            with self.path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    file.seek(0)
                    raise ConfigError(_explain_not_a_zip(self.path, file))
            self._zip = zipfile.ZipFile(self.path)
            self._root, pickled = self._read_pickle()
            checkpoint = _unpickle(self.path, io.BytesIO(pickled))
        except (zipfile.BadZipFile, EOFError) as error:
            raise ConfigError(f"{self.path}: damaged checkpoint ({error})") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        self.tensors, self.fields = _find_state_dict(self.path, checkpoint)

    def read(self, name: str) -> np.ndarray:
        """One tensor. Only its storage is held in memory."""
        tensor = self.tensors[name]
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, tensor.dtype)
        record = self._read_record(tensor.storage)
        storage = np.frombuffer(record, tensor.dtype, len(record) // tensor.dtype.itemsize)
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        if last >= storage.size:  # as_strided would read memory that does not belong to the file
            raise ConfigError(f"{self.path}: damaged checkpoint ({name} extends beyond its storage)")
        strides = [stride * storage.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)

    def _read_pickle(self) -> tuple[str, bytes]:
        """The folder inside the archive that holds everything, and the pickle."""
        names = self._zip.namelist()
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ConfigError(f"{self.path}: a zip file, but not a PyTorch checkpoint (no data.pkl)")
        root = pickles[0].removesuffix("data.pkl")
        byteorder = root + "byteorder"
        if byteorder in names and self._zip.read(byteorder).strip() != b"little":
            raise ConfigError(f"{self.path}: stored big-endian; load and save it again on a little-endian machine")
        return root, self._zip.read(pickles[0])

    def _read_record(self, storage: str) -> bytes:
        """The bytes of a storage. The last one is kept, since tensors that share a storage follow each other."""
        if self._last_record is not None and self._last_record[0] == storage:
            return self._last_record[1]
        self._last_record = None  # frees its memory before the next storage is read
        try:
            record = self._zip.read(f"{self._root}data/{storage}")
        except (KeyError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise ConfigError(f"{self.path}: damaged checkpoint (storage {storage}: {error})") from None
        self._last_record = storage, record
        return record


def _unpickle(path: Path, file: BinaryIO) -> Any:
    try:
        return _make_unpickler(path, file).load()
    except ConfigError:
        raise
    except Exception as error:  # a malformed pickle can raise anything, but could only call what is allowed below
        raise ConfigError(f"{path}: its pickle cannot be read ({type(error).__name__}: {error})") from None


def _make_unpickler(path: Path, file: BinaryIO) -> pickle.Unpickler:
    """A new unpickler with placeholders of its own, so that nothing a pickle does to them outlasts it."""

    class Config(dict):
        """Holds the pickled dataclass's fields."""

        def __setstate__(self, state: Any) -> None:
            if isinstance(state, Mapping):
                self.update(state)

    def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ConfigError(f"{path}: damaged checkpoint (a tensor without a storage)")
        if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
            raise ConfigError(f"{path}: damaged checkpoint (a tensor of impossible shape)")
        return StoredTensor(storage.key, np.dtype(storage.dtype), offset, tuple(shape), tuple(strides))

    def rebuild_parameter(tensor: Any, *_: Any) -> Any:
        return tensor

    allowed: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        CONFIG_CLASS: Config,
        **{("torch", name): name for name in STORAGES},
        **{("torch.storage", name): name for name in STORAGES},
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise ConfigError(f"{path}: refused: its pickle names {module}.{name}, which is not plain data")
            return allowed[module, name]

        def persistent_load(self, pid: Any) -> _Storage:
            if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or pid[1] not in STORAGES:
                raise ConfigError(f"{path}: holds a storage of an unknown type, {str(pid[1:2])[:60]}")
            return _Storage(str(pid[2]), np.dtype(STORAGES[pid[1]]), pid[4])

    return Unpickler(file)


def _explain_not_a_zip(path: Path, file: BinaryIO) -> str:
    """The error for a file that is not a zip. An old checkpoint is a bare pickle, so what it refers to is checked."""
    if file.read(2) == b"PK":
        return f"{path}: damaged checkpoint (a truncated zip file)"
    file.seek(0)
    try:
        _make_unpickler(path, file).load()
    except ConfigError as error:
        return str(error)
    except Exception:
        return f"{path}: not a PyTorch checkpoint"
    return f"{path}: a plain pickle or a checkpoint from before PyTorch 1.6; load and save it again with a newer one"


def _find_state_dict(path: Path, checkpoint: Any) -> tuple[dict[str, StoredTensor], dict[str, Any] | None]:
    """The tensors by name, and the config's fields if the checkpoint has any."""
    if not isinstance(checkpoint, Mapping):
        got = type(checkpoint).__name__
        raise ConfigError(f"{path}: got a {got}, allowed: a state dict, or a dict that holds one")
    configs = [checkpoint.get(key) for key in CONFIG_KEYS]
    fields = next((dict(config) for config in configs if isinstance(config, Mapping)), None)
    states = [checkpoint.get(key) for key in STATE_DICT_KEYS]
    state = next((state for state in states if isinstance(state, Mapping)), checkpoint)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, StoredTensor)}
    if not tensors:
        raise ConfigError(f"{path}: holds no tensors; allowed: a state dict, or a dict with one under 'model'")
    return tensors, fields
