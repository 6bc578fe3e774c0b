"""Writing a model's directory: tensors, `config.json`, tokenizer. It appears complete or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mythos_jax.data.conventions import gguf_files
from mythos_jax.data.tokenizer import TOKENIZER_FILE
from mythos_jax.errors import ConfigError
from mythos_jax.porting.layouts import Shape
from mythos_jax.porting.tables import ReadArray, Row, Table
from mythos_jax.progress import Progress

SHARD_BYTES = 5 * 10**9

WrittenTensors = dict[str, tuple[Shape, str]]  # shape and dtype by name


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` if the block succeeds and is deleted if it raises.

    Raises ConfigError if `path` exists: nothing is ever overwritten.
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Next to `path`, hence on the same file system, where a rename is atomic.
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp makes directories that only their owner can enter
        yield temporary
        refuse_existing(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(path: str | Path) -> None:
    """Raises ConfigError if `path` exists or looks like the name of a file."""
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: exists already; allowed: a new path, since nothing is overwritten")
    if path.suffix in (".safetensors", ".pt", ".bin", ".json"):
        raise ConfigError(f"{path}: got the name of a file, allowed: a directory to create")


def write_model(
    directory: Path,
    config_json: Mapping[str, Any],
    table: Table,
    parameter: ReadArray,
    parameter_dtype: Callable[[str], np.dtype],
    *,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> WrittenTensors:
    """Writes `config.json`, the table's tensors, and a copy of the tokenizer; returns the tensors written.

    parameter: returns our parameter at a path; parameter_dtype: its dtype, without reading it. One shard is in memory
    at a time, which is the whole model if it fits into `shard_bytes`.
    """
    (directory / "config.json").write_text(json.dumps(config_json, indent=1) + "\n", encoding="utf-8")
    if tokenizer is not None and tokenizer.suffix == ".gguf":
        for name, content in gguf_files(tokenizer).items():
            (directory / name).write_bytes(content)
    elif tokenizer is not None:
        (directory / TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
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
            _save(tensors, directory / file_name)
            written |= {name: (array.shape, array.dtype.name) for name, array in tensors.items()}
            weight_map |= dict.fromkeys(tensors, file_name)
            total_bytes += sum(array.nbytes for array in tensors.values())
            del tensors  # before the next shard is built
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return written


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes one safetensors file and waits until it is on the disk."""
    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses files without a format
    path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shards(table: Table, parameter_dtype: Callable[[str], np.dtype], max_bytes: int) -> list[list[Row]]:
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
