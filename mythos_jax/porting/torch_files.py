"""PyTorch checkpoints (`.pt`, `.bin`), read without PyTorch and without running anything that they name.

A checkpoint is a zip of one pickle and one raw record per storage. The pickle is read by an unpickler that knows
plain containers, tensors, and the config dataclass of OpenMythos's trainer, whose fields it keeps in an inert
stand-in; every other global is refused by name before anything is called.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in the file: a strided view of one storage, counted in elements."""

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
    """The tensors of one checkpoint by name, and the config that the trainer put beside them, if any.

    Looks for the state dict at the top or under "model", "model_state_dict" or "state_dict". Raises ConfigError:
    not a checkpoint, damaged, or a global that is not plain data.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._last: tuple[str, bytes] | None = None
        try:
            with self.path.open("rb") as file:
                zipped = zipfile.is_zipfile(file)
                if not zipped:
                    file.seek(0)
                    raise ConfigError(_not_a_zip(self.path, file))
            self._zip = zipfile.ZipFile(self.path)
            pickles = [name for name in self._zip.namelist() if name.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1:
                raise ConfigError(f"{self.path}: a zip file, but not a PyTorch checkpoint (no data.pkl)")
            self._root = pickles[0].removesuffix("data.pkl")
            names = set(self._zip.namelist())
            order = self._zip.read(self._root + "byteorder") if self._root + "byteorder" in names else b"little"
            if order.strip() != b"little":
                raise ConfigError(f"{self.path}: stored big-endian; load and save it again on a little-endian machine")
            tree = _load(self.path, self._zip.read(pickles[0]))
        except (zipfile.BadZipFile, EOFError) as error:
            raise ConfigError(f"{self.path}: damaged checkpoint ({error})") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        self.tensors, self.fields = _find(self.path, tree)

    def read(self, name: str) -> np.ndarray:
        """One tensor; only its storage is in memory."""
        tensor = self.tensors[name]
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, tensor.dtype)
        record = self._record(tensor.storage)
        data = np.frombuffer(record, tensor.dtype, len(record) // tensor.dtype.itemsize)
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        if last >= data.size:
            raise ConfigError(f"{self.path}: damaged checkpoint ({name} lies outside of its storage)")
        strides = [stride * data.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, strides, writeable=False)

    def _record(self, key: str) -> bytes:
        if self._last is None or self._last[0] != key:
            self._last = None  # frees the storage before the next is read
            try:
                self._last = key, self._zip.read(f"{self._root}data/{key}")
            except (KeyError, zipfile.BadZipFile, EOFError, OSError) as error:
                raise ConfigError(f"{self.path}: damaged checkpoint (storage {key}: {error})") from None
        return self._last[1]


def _load(path: Path, data: bytes) -> Any:
    try:
        return _unpickler(path, io.BytesIO(data)).load()
    except ConfigError:
        raise
    except Exception as error:  # whatever a crooked pickle leads to: it ran nothing but what is allowed below
        raise ConfigError(f"{path}: its pickle cannot be read ({type(error).__name__}: {error})") from None


def _unpickler(path: Path, file: Any) -> pickle.Unpickler:
    """A new unpickler with stand-ins of its own, so that nothing a pickle does to them outlives it."""

    class Config(dict):
        """Holds the pickled dataclass's fields."""

        def __setstate__(self, state: Any) -> None:
            if isinstance(state, Mapping):
                self.update(state)

    def rebuild_tensor(storage, offset, shape, strides, *_):
        whole = [offset, *shape, *strides]
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ConfigError(f"{path}: damaged checkpoint (a tensor without a storage)")
        if not all(isinstance(n, int) and n >= 0 for n in whole):
            raise ConfigError(f"{path}: damaged checkpoint (a tensor of impossible shape)")
        return StoredTensor(storage.key, np.dtype(storage.dtype), offset, tuple(shape), tuple(strides))

    def rebuild_parameter(tensor, *_):
        return tensor

    allowed = {
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
                raise ConfigError(f"{path}: refused: its pickle names {module}.{name}, which is no plain data")
            return allowed[module, name]

        def persistent_load(self, pid: Any) -> _Storage:
            if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or pid[1] not in STORAGES:
                raise ConfigError(f"{path}: holds a storage of an unknown kind, {str(pid[1:2])[:60]}")
            return _Storage(str(pid[2]), np.dtype(STORAGES[pid[1]]), pid[4])

    return Unpickler(file)


def _not_a_zip(path: Path, file: Any) -> str:
    """What is wrong with a file that is no zip; the pickle of an old checkpoint is looked at, to name what it names."""
    if file.read(2) == b"PK":
        return f"{path}: damaged checkpoint (a zip file that is cut off)"
    file.seek(0)
    try:
        _unpickler(path, file).load()
    except ConfigError as error:
        return str(error)
    except Exception:
        return f"{path}: not a PyTorch checkpoint"
    return f"{path}: a plain pickle or a checkpoint from before PyTorch 1.6; load and save it again with a newer one"


def _find(path: Path, tree: Any) -> tuple[dict[str, StoredTensor], dict[str, Any] | None]:
    """The state dict and the config in what was unpickled."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: got a {type(tree).__name__}, allowed: a state dict, or a dict that holds one")
    fields = next((dict(tree[key]) for key in ("cfg", "config") if isinstance(tree.get(key), Mapping)), None)
    states = [tree.get(key) for key in ("model", "model_state_dict", "state_dict")]
    state = next((state for state in states if isinstance(state, Mapping)), tree)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, StoredTensor)}
    if not tensors:
        raise ConfigError(f"{path}: holds no tensors; allowed: a state dict, or a dict with one under 'model'")
    for prefix in ("_orig_mod.", "module."):  # what torch.compile and DDP put before every name
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, fields
