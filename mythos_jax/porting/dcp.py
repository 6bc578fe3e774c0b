"""Directories of torch.distributed.checkpoint: `.metadata` names the pieces of each tensor, `*.distcp` hold them.

Each piece is a file of `torch.save` inside a `.distcp` file.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.porting.layouts import Shape
from mythos_jax.porting.pickles import Inert, Name, unpickle
from mythos_jax.porting.tensor_info import UNKNOWN, TensorInfo
from mythos_jax.porting.torch_archives import ZipArchive
from mythos_jax.porting.torch_objects import StoredTensor, TorchObjects, dtype_of, shape_of
from mythos_jax.porting.trainer_files import CONFIG_KEYS, find_configs, find_weights, unreadable

METADATA = ".metadata"


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor, or an object that is not a tensor: where it is stored, and which part it is."""

    file: str
    start: int
    length: int
    offsets: Shape = ()
    sizes: Shape = ()


@dataclass(frozen=True)
class _ShardedTensor(TensorInfo):
    pieces: tuple[_Piece, ...] = ()


class DcpDirectory:
    """The tensors of one such directory by name; `key`, `configs` and `notes` as in `TorchFile`.

    Raises ConfigError: damaged, a file missing, or without weights.
    """

    def __init__(self, path: Path, key: str | None = None):
        self.path = path
        self.notes: list[str] = []
        try:
            with (path / METADATA).open("rb") as file:
                saved = self._describe(unpickle(file, TorchObjects().call, TorchObjects().persistent))
        except OSError as error:
            raise ConfigError(f"{path / METADATA}: cannot be read ({error.strerror or error})") from None
        except ConfigError:
            raise
        except Exception as error:  # a malformed pickle can raise anything
            text = one_line(error, 200)
            raise ConfigError(f"{path / METADATA}: damaged checkpoint ({type(error).__name__}: {text})") from None
        self.tensors = find_weights(path, saved, self.notes, key)
        self.configs = find_configs(saved)

    def read(self, name: str) -> np.ndarray:
        """One tensor, put together from its pieces."""
        tensor = self.tensors[name]
        if not isinstance(tensor, _ShardedTensor) or tensor.kind:
            raise unreadable(self.path, name, tensor)
        whole = np.zeros(tensor.shape, tensor.dtype)
        for piece in tensor.pieces:
            archive = self._open(piece)
            stored = archive.value
            if not isinstance(stored, StoredTensor) or (stored.shape, stored.dtype) != (piece.sizes, tensor.dtype):
                raise ConfigError(f"{self.path / piece.file}: damaged checkpoint (a piece of {name})")
            ends = zip(piece.offsets, piece.sizes, strict=True)
            whole[tuple(slice(start, start + size) for start, size in ends)] = archive.read(name, stored)
        return whole

    def _open(self, piece: _Piece) -> ZipArchive:
        path = self.path / piece.file
        try:
            with path.open("rb") as file:
                file.seek(piece.start)
                return ZipArchive(io.BytesIO(file.read(piece.length)), path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None

    def _describe(self, metadata: Inert) -> dict[Any, Any]:
        """What was saved, as nested dicts: with tensors, and of other objects those that may be the config."""
        pieces: dict[tuple[str, Shape], _Piece] = {}
        for index, storage in metadata.attributes["storage_data"].items():
            at, stored = index.attributes, storage.attributes
            if stored.get("transform_descriptors"):
                raise ConfigError(f"{self.path}: its pieces are compressed or encrypted, allowed: as torch saves them")
            piece = self._piece(stored["relative_path"], stored["offset"], stored["length"])
            pieces[at["fqn"], at.get("offset") or ()] = piece
        keys = metadata.attributes.get("planner_data") or {}
        saved: dict[Any, Any] = {}
        for name, described in metadata.attributes["state_dict_metadata"].items():
            place = keys.get(name, (name,)) if isinstance(keys, dict) else (name,)
            inner = saved
            for key in place[:-1]:
                inner = inner.setdefault(key, {})
            if "chunks" in described.attributes:
                inner[place[-1]] = _tensor(name, described, pieces)
            elif place[0] in CONFIG_KEYS:
                inner[place[-1]] = self._open(pieces[name, ()]).value
        return saved

    def _piece(self, name: Any, start: Any, length: Any) -> _Piece:
        if not isinstance(name, str) or Path(name).name != name:
            got = repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"
            raise ConfigError(f"{self.path / METADATA}: names file {got}, allowed: files in the same directory")
        if not (self.path / name).is_file():
            raise ConfigError(f"{self.path / METADATA}: names file {name}, which is missing")
        start, length = shape_of((start, length))
        if start + length > (self.path / name).stat().st_size:
            raise ConfigError(f"{self.path / name}: damaged checkpoint (truncated)")
        return _Piece(name, start, length)


def _tensor(name: str, described: Inert, pieces: dict[tuple[str, Shape], _Piece]) -> TensorInfo:
    shape = shape_of(described.attributes["size"])
    properties = described.attributes["properties"]
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.attributes.get("dtype")
    known = dtype_of(dtype)
    if known is None:
        return TensorInfo(shape, UNKNOWN, f"a tensor of {dtype if isinstance(dtype, Name) else 'an unknown dtype'}")
    placed = []
    for chunk in described.attributes["chunks"]:
        offsets, sizes = shape_of(chunk.attributes["offsets"]), shape_of(chunk.attributes["sizes"])
        piece = pieces.get((name, offsets)) or pieces[name, ()]
        inside = all(a + n <= end for a, n, end in zip(offsets, sizes, shape, strict=True))
        if not inside:
            raise ValueError(f"a piece of {name} lies outside of it")
        placed.append(_Piece(piece.file, piece.start, piece.length, offsets, sizes))
    if sum(math.prod(piece.sizes) for piece in placed) != math.prod(shape):
        raise ValueError(f"the pieces of {name} do not cover it")
    return _ShardedTensor(shape, known, "", tuple(placed))
