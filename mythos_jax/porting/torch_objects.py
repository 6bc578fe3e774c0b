"""What the names in PyTorch's pickles stand for: storages, tensors of all kinds, dictionaries. Nothing of PyTorch is
needed for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mythos_jax.porting.pickles import Inert, Name
from mythos_jax.porting.tensor_info import UNKNOWN, TensorInfo

# By PyTorch's names; of the other dtypes (complex32, quantised and sub-byte integers) the numbers cannot be read.
DTYPES: Mapping[str, np.dtype] = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128", "bool")},
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}
QUANTISED = {"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}  # bytes of an element of the storage
LARGEST = 2**62  # no size, offset or stride in elements is larger
MOST_AXES = 32  # of an array of NumPy

# Functions that make tensors whose numbers are not read here: the kind, and where among the arguments the shape is.
OTHER_KINDS = {
    "_rebuild_sparse_tensor": ("a sparse tensor", None),
    "_rebuild_sparse_csr_tensor": ("a sparse tensor", None),
    "_rebuild_qtensor": ("a quantized tensor", 2),
    "_rebuild_meta_tensor_no_storage": ("a meta tensor, without data", 1),
    "_rebuild_nested_tensor": ("a nested tensor", None),
    "_rebuild_wrapper_subclass": ("a part of a sharded tensor, or a tensor of a class of its own", 2),
    "_rebuild_device_tensor_from_numpy": ("a tensor in the form of its device", None),
    "_rebuild_xla_tensor": ("a tensor in the form of its device", None),
}


@dataclass(frozen=True)
class Storage:
    """The numbers of one or several tensors. start: elements that are skipped; length: in elements."""

    key: str
    dtype: str
    start: int
    length: int

    @property
    def element_bytes(self) -> int:
        return QUANTISED[self.dtype] if self.dtype in QUANTISED else DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor that is still in the file: a strided view of one storage. Offset and strides count elements."""

    storage: str = ""
    offset: int = 0
    strides: tuple[int, ...] = ()


class TorchObjects:
    """What stands for the objects of one pickle; `storages` are those that it names, by key."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._converted: dict[int, tuple[list[Any], dict[Any, Any]]] = {}

    def persistent(self, pid: Any) -> Any:
        """A storage. Pickles of whole modules have ids of classes, too, which stand for their second element."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
            raise ValueError("an id that is not a storage's")
        _, kind, key, _, length, *view = pid
        if kind.name not in STORAGES:
            raise ValueError(f"a storage of unknown type {kind.name[:60]}")
        if not isinstance(key, str | int) or not _is_size(length):
            raise ValueError("a storage without a length")
        whole = Storage(str(key), STORAGES[kind.name], 0, length)
        self.storages[whole.key] = whole
        if not view or view[0] is None:
            return whole
        _, start, length = view[0]  # a part of another storage, in files of PyTorch before 0.4
        if not _is_size(start) or not _is_size(length):
            raise ValueError("a part of a storage without a length")
        return Storage(whole.key, whole.dtype, start, length)

    def call(self, function: Name, arguments: tuple[Any, ...]) -> Any:
        """What stands for the result of a function: an `Inert` if nothing better is known."""
        module, name = function.module, function.name
        if module == "collections":
            return self._dictionary(name, arguments)
        if module == "torch" and name == "Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if module not in ("torch._utils", "torch._tensor", "torch.tensor"):
            return Inert(function, arguments)
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            return self._tensor(storage, offset, shape, strides, metadata=arguments[6:7])
        if name == "_rebuild_tensor_v3":
            storage, offset, shape, strides = arguments[:4]
            return self._tensor(storage, offset, shape, strides, dtype=arguments[6], metadata=arguments[7:8])
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_device_tensor_from_cpu_tensor"):
            return arguments[0]
        if name in ("_rebuild_from_type", "_rebuild_from_type_v2") and isinstance(arguments[0], Name):
            return self.call(arguments[0], arguments[2])
        if name in OTHER_KINDS:
            kind, position = OTHER_KINDS[name]
            return TensorInfo(shape_of(arguments[position]) if position is not None else (), UNKNOWN, kind)
        return Inert(function, arguments)

    def _dictionary(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in ("OrderedDict", "Counter", "defaultdict"):
            content = arguments[0] if arguments else {}
            if isinstance(content, dict):
                return content
            if name == "defaultdict":  # of which the argument is the function that makes a missing entry
                return {}
            if isinstance(content, list) and all(map(_is_pair, content)):  # from Python 2
                if id(content) not in self._converted:  # once, however often a pickle asks for it
                    self._converted[id(content)] = content, dict(content)
                return self._converted[id(content)][1]
        return Inert(Name("collections", name), arguments)

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None, metadata: tuple[Any, ...] = ()
    ) -> TensorInfo:
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        shape, strides = shape_of(shape), shape_of(strides)
        if len(shape) != len(strides) or not _is_size(offset):
            raise ValueError("a tensor of impossible shape")
        name = dtype.name if isinstance(dtype, Name) else storage.dtype
        flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
        if any(flags.values()):
            return TensorInfo(shape, UNKNOWN, "a view that changes signs (conj or neg)")
        if name not in DTYPES:
            return TensorInfo(shape, UNKNOWN, f"a tensor of {name[:60]}")
        if storage.dtype != name and storage.dtype != "uint8":
            raise ValueError("a tensor whose dtype is not its storage's")
        return StoredTensor(shape, DTYPES[name], "", storage.key, storage.start + offset, strides)


def dtype_of(name: Any) -> np.dtype | None:
    """The dtype that a pickle names; None if it is not one whose numbers can be read."""
    return DTYPES.get(name.name) if isinstance(name, Name) and name.module == "torch" else None


def shape_of(value: Any) -> tuple[int, ...]:
    """The value, if it can be a shape or strides. Raises ValueError."""
    if not isinstance(value, tuple) or len(value) > MOST_AXES or not all(map(_is_size, value)):
        raise ValueError("a tensor of impossible shape")
    return value


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
