"""Batches on the device mesh: how rows divide over devices, and global arrays from each process's rows."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mythos_jax.errors import ConfigError
from mythos_jax.sharding import BATCH_AXES


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a global batch divided over the data, fsdp and expert axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, name: str) -> None:
    """Raises ConfigError if the batch size does not divide over the mesh; `name` is the field to blame."""
    ways = _ways(mesh)
    if batch_size % ways:
        raise ConfigError(f"{name}: got {batch_size}, allowed: a multiple of {ways} (data x fsdp x expert devices)")


def fitting_batch(mesh: Mesh | AbstractMesh, batch_size: int) -> int:
    """The batch size, rounded up to a multiple that divides over the mesh."""
    return -(-batch_size // _ways(mesh)) * _ways(mesh)


def _ways(mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The numbers of the rows of a global batch that this process's devices hold, sorted."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> Any:
    """Puts a batch on the mesh; every process passes all of its rows."""
    sharding, size = batch_sharding(mesh), len(next(iter(batch.values())))
    rows = local_rows(sharding, size)
    return to_global(sharding, size, rows, {name: values[rows] for name, values in batch.items()})


def to_global(sharding: NamedSharding, batch_size: int, rows: np.ndarray, local: dict[str, np.ndarray]) -> Any:
    """Global arrays from this process's rows: `local[name][i]` is row `rows[i]` of the global batch."""

    def place(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:  # None in jax's type only: for arrays without a shape
            selected = np.arange(batch_size)[index[0] if index else slice(None)]
            return values[np.searchsorted(rows, selected)]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard)

    return {name: place(values) for name, values in local.items()}
