"""Writing a model's tensors, and the directory that they go into, which appears complete or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mythos_jax.errors import ConfigError
from mythos_jax.porting.layouts import Shape
from mythos_jax.porting.tables import ReadArray, Row, Table
from mythos_jax.porting.torch_writer import TorchWriter
from mythos_jax.progress import Progress

SHARD_BYTES = 5 * 10**9

WrittenTensors = dict[str, tuple[Shape, str]]  # shape and dtype by name
ParameterDtype = Callable[[str], np.dtype]


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` if the block succeeds and is deleted if it raises.

    Raises ConfigError if `path` exists and is not an empty directory: nothing is ever overwritten.
    """
    path = Path(path)
    refuse_existing(path)
    path = path.resolve()  # a link to an empty directory stays a link
    mounted = os.path.ismount(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as `path`, where a rename is atomic: next to it, unless it is a file system of its own.
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path if mounted else path.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp makes directories that only their owner can enter
        yield temporary
        if mounted:
            _move_into(temporary, path)
        else:
            refuse_existing(path)
            temporary.rename(path)  # also onto an empty directory
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _move_into(temporary: Path, path: Path) -> None:
    """Moves the files of a directory up, the config last, without which there is no model."""
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(path / file.name)
    temporary.rmdir()


def refuse_existing(path: str | Path) -> None:
    """Raises ConfigError if `path` exists, except as an empty directory, or looks like the name of a file."""
    path = Path(path)
    is_empty = path.is_dir() and next(path.iterdir(), None) is None
    if not is_empty and (path.exists() or path.is_symlink()):
        raise ConfigError(
            f"{path}: exists already; allowed: a new path or an empty directory, since nothing is overwritten"
        )
    if path.suffix in (".safetensors", ".pt", ".bin", ".json"):
        raise ConfigError(f"{path}: got the name of a file, allowed: a directory to create")


def write_tensors(
    directory: Path,
    table: Table,
    parameter: ReadArray,
    parameter_dtype: ParameterDtype,
    buffers: Mapping[str, np.ndarray],
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> WrittenTensors:
    """Writes the table's tensors and `buffers` as safetensors; returns what was written.

    parameter: returns our parameter at a path; parameter_dtype: its dtype, without reading it. One shard is in memory
    at a time, which is the whole model if it fits into `shard_bytes`.
    """
    shards = _shards(table, parameter_dtype, shard_bytes)
    written: WrittenTensors = {}
    weight_map: dict[str, str] = {}
    total_bytes = 0
    with Progress(len(table.rows), "writing", "tensor", show=progress) as bar:
        for number, rows in enumerate(shards, 1):
            file_name = "model.safetensors"
            if len(shards) > 1:
                file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors: dict[str, np.ndarray] = {}
            for row in rows:
                tensors |= {name: np.ascontiguousarray(array) for name, array in row.write(parameter)}
                bar.update()
            if number == len(shards):
                tensors |= buffers
            save_safetensors(tensors, directory / file_name)
            written |= {name: (array.shape, array.dtype.name) for name, array in tensors.items()}
            weight_map |= dict.fromkeys(tensors, file_name)
            total_bytes += sum(array.nbytes for array in tensors.values())
            del tensors  # before the next shard is built
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return written


def write_pytorch_bin(
    directory: Path,
    table: Table,
    parameter: ReadArray,
    buffers: Mapping[str, np.ndarray],
    progress: bool = True,
) -> WrittenTensors:
    """Writes `pytorch_model.bin`, always a single file, with one row of the table in memory at a time."""
    written: WrittenTensors = {}
    path = directory / "pytorch_model.bin"
    with Progress(len(table.rows), "writing", "tensor", show=progress) as bar:
        with TorchWriter(path) as file:
            for row in table.rows:
                for name, array in row.write(parameter):
                    file.add(name, array)
                    written[name] = array.shape, array.dtype.name
                bar.update()
            for name, array in buffers.items():
                file.add(name, array)
                written[name] = array.shape, array.dtype.name
        _sync(path)
    return written


def save_safetensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes one safetensors file and waits until it is on the disk."""
    save_file(dict(tensors), path, metadata={"format": "pt"})  # transformers refuses files without a format
    path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shards(table: Table, parameter_dtype: ParameterDtype, max_bytes: int) -> list[list[Row]]:
    """The rows in order, in shards of at most `max_bytes`; a row is never divided, even if it is larger."""
    shards: list[list[Row]] = [[]]
    shard_size = 0
    for row in table.rows:
        row_size = sum(math.prod(table.our_shapes[path]) * parameter_dtype(path).itemsize for path in row.ours)
        if shards[-1] and shard_size + row_size > max_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(row)
        shard_size += row_size
    return shards


def _umask() -> int:
    """The process's file-creation mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
