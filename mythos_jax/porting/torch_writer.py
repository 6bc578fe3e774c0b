"""Writing a PyTorch checkpoint (`torch.save` of a state dict) without PyTorch, one tensor at a time.

The file is a zip archive, not compressed: a record of raw bytes for each tensor, and a pickle that says which record
belongs to which name. `torch.load(weights_only=True)` reads it, with and without `mmap`.
"""

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mythos_jax.porting.layouts import Shape

ROOT = "archive/"
LOCAL_HEADER = 30  # bytes before the name of a record
ALIGNMENT = 64  # of each record in the file, as PyTorch's own, so that it can be mapped into memory
STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}


class TorchWriter:
    """A checkpoint that is being written: `add` tensors in a `with` block, whose end completes the file."""

    def __init__(self, path: Path):
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._tensors: dict[str, tuple[str, Shape]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write("data.pkl", _pickled(self._tensors))
            self._write("byteorder", b"little")
            self._write("version", b"3\n")
        self._zip.close()

    def add(self, name: str, array: np.ndarray) -> None:
        numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._write(f"data/{len(self._tensors)}", numbers.data)
        self._tensors[name] = (array.dtype.name, array.shape)

    def _write(self, name: str, content: bytes | memoryview) -> None:
        entry = zipfile.ZipInfo(ROOT + name)
        entry.external_attr = 0o644 << 16
        # `zipfile` adds 20 bytes to the headers of records that may be too large for the old format.
        wide = 20 if len(content) * 1.05 > zipfile.ZIP64_LIMIT else 0
        assert self._zip.fp is not None
        padding = -(self._zip.fp.tell() + LOCAL_HEADER + len(entry.filename) + wide + 4) % ALIGNMENT
        # A field that readers step over; its identifier is the one that PyTorch uses.
        entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        self._zip.writestr(entry, content)


def _pickled(tensors: dict[str, tuple[str, Shape]]) -> bytes:
    """The pickle of an `OrderedDict` of `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, …)`."""
    empty = _global("collections", "OrderedDict") + b")R"
    parts = [pickle.PROTO + b"\x02", empty, pickle.MARK]
    for number, (name, (dtype, shape)) in enumerate(tensors.items()):
        strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
        elements = int(np.prod(shape, dtype=np.int64))
        storage = [
            _text("storage"),
            _global("torch", STORAGES[dtype]),
            _text(str(number)),
            _text("cpu"),
            _int(elements),
        ]
        arguments = [
            _tuple(storage) + pickle.BINPERSID,
            _int(0),
            _tuple(map(_int, shape)),
            _tuple(map(_int, strides)),
            pickle.NEWFALSE,  # needs no gradient
            empty,  # no hooks
        ]
        parts += [_text(name), _global("torch._utils", "_rebuild_tensor_v2"), _tuple(arguments), pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    content = value.encode()
    return pickle.BINUNICODE + len(content).to_bytes(4, "little") + content


def _int(value: int) -> bytes:
    return pickle.LONG1 + b"\x08" + value.to_bytes(8, "little", signed=True)


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
