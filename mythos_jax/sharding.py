"""Where arrays live: the device mesh, the one table from logical axis names to mesh axes, and placement by it.

Weights and activations carry logical names (`embed`, `heads`, `batch`, …) in the model; nothing there knows of a mesh.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mythos_jax.config import ConfigError, MeshConfig

BATCH_AXES = ("data", "fsdp", "expert")

# logical name -> mesh axes. A name that is not here, or maps to None, is replicated along that axis.
RULES: tuple[tuple[str, Any], ...] = (
    # Activations.
    ("batch", BATCH_AXES),
    ("length", "sequence"),
    ("act_embed", None),  # the residual stream is whole on every device of a tensor group
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    # Weights: fsdp cuts the model width, tensor cuts heads, hidden width and vocabulary, expert cuts experts.
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("expert", "expert"),
    ("head_dim", None),
    ("latent", None),
    ("lora", None),
    ("norm", None),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; the axis that is -1 takes what the others leave. Raises ConfigError where none fits."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(config).items())
        raise ConfigError(f"mesh: got {wanted}, allowed: sizes whose product is the number of devices, {len(devices)}")
    # Auto axes: Linen's constraints raise under Explicit ones.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside, logical names in the model mean axes of this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def initialise(make: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    """Runs `make`, jitted, straight into shards: no device ever holds the whole. Returns plain arrays, unboxed."""
    with use_mesh(mesh):
        placed = shardings(mesh, jax.eval_shape(make, *arguments))
        return jax.jit(lambda *a: nn.unbox(make(*a)), out_shardings=placed)(*arguments)


def abstract(make: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    """What `initialise` would return, as shapes and dtypes with their places; nothing runs."""
    with use_mesh(mesh):
        placed = shardings(mesh, jax.eval_shape(make, *arguments))
        arrays = jax.eval_shape(lambda *a: nn.unbox(make(*a)), *arguments)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays, placed)


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """The place of each array of a tree whose leaves carry logical axes, by the rules."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a global batch over data, fsdp and expert."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises ConfigError when the batch does not divide over the mesh."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % ways:
        raise ConfigError(f"{name}: got {batch_size}, allowed: a multiple of {ways} (data x fsdp x expert devices)")


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, sorted."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def to_global(sharding: NamedSharding, batch_size: int, rows: np.ndarray, local: dict[str, np.ndarray]) -> Any:
    """Global arrays from this process's rows of them, `local[name][i]` being row `rows[i]` of the global batch."""

    def place(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return values[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard)

    return {name: place(values) for name, values in local.items()}
