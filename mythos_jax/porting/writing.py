"""Writing a model's directory: tensors, `config.json`, tokenizer. It appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from mythos_jax.errors import ConfigError
from mythos_jax.porting.tables import Row, Table

SHARD_BYTES = 5 * 10**9


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory beside `path` that becomes `path` when the block ends well and vanishes when it does not.

    Raises ConfigError when `path` exists: nothing is ever overwritten.
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that the rename is one step.
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        refuse_existing(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(path: str | Path) -> None:
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: exists already; allowed: a new path, nothing is overwritten")
    if path.suffix in (".safetensors", ".pt", ".bin", ".json"):
        raise ConfigError(f"{path}: got the name of a file, allowed: a directory to make")


def write_model(
    directory: Path,
    config_json: Mapping[str, Any],
    table: Table,
    parameter: Callable[[str], np.ndarray],
    dtype_of: Callable[[str], np.dtype],
    *,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Writes `config.json`, the tensors that the table makes of our parameters, and a copy of the tokenizer.

    parameter gives one of our parameters by path, dtype_of its dtype without reading it. Memory holds one shard: the
    model where it fits into `shard_bytes`. Returns shape and dtype of every tensor written.
    """
    (directory / "config.json").write_text(json.dumps(config_json, indent=1) + "\n")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, directory / "tokenizer.json")
    shards = _shards(table, dtype_of, shard_bytes)
    written: dict[str, tuple[tuple[int, ...], str]] = {}
    where: dict[str, str] = {}
    total = 0
    with tqdm(total=len(table.rows), desc="writing", unit="tensor", disable=None if progress else True) as bar:
        for number, rows in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors: dict[str, np.ndarray] = {}
            for row in rows:
                tensors |= {name: np.ascontiguousarray(array) for name, array in table.write(row, parameter)}
                bar.update()
            save_file(tensors, directory / name, metadata={"format": "pt"})
            (directory / name).chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
            with (directory / name).open("rb") as file:
                os.fsync(file.fileno())
            written |= {key: (array.shape, array.dtype.name) for key, array in tensors.items()}
            where |= dict.fromkeys(tensors, name)
            total += sum(array.nbytes for array in tensors.values())
            del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return written


def _shards(table: Table, dtype_of: Callable[[str], np.dtype], most: int) -> list[list[Row]]:
    """The rows in order, cut where a shard would grow beyond `most` bytes; a row is never cut."""
    shards: list[list[Row]] = [[]]
    size = 0
    for row in table.rows:
        bytes_ = sum(int(np.prod(table.ours[path])) * dtype_of(path).itemsize for path in row.ours)
        if shards[-1] and size + bytes_ > most:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += bytes_
    return shards


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
