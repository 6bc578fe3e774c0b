"""Where arrays live: the device mesh, the one table from logical axis names to mesh axes, and shardings by it.

In the model, weights and activations have logical axis names (`embed`, `heads`, `batch`, …). `constrain` and
`axis_size` use the current mesh; without one they do nothing. The table is explained in docs/sharding.md.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "expert", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")
WEIGHT_AXES = ("fsdp", "tensor", "expert")

# Logical name -> mesh axes; None: replicated on purpose. Every name in the model is listed.
RULES: tuple[tuple[str, Any], ...] = (
    # Activations.
    ("batch", BATCH_AXES),
    ("length", "sequence"),
    ("keys", None),  # of keys and values: queries divided over `sequence` attend to all of them
    ("cache_length", "sequence"),  # positions in a cache
    ("act_embed", None),  # the residual stream is replicated within a tensor group
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    ("slots", None),  # loops stored in a cache
    ("pages", None),  # of a pool that all rows share
    ("page", None),  # positions in a page
    # Weights: fsdp divides the model width; tensor the heads, hidden width and vocabulary; expert the experts. The
    # width of all other weights is divided over the expert axis, too, or every expert group would hold a full copy.
    ("expert", "expert"),
    ("embed", ("fsdp", "expert")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("head_dim", None),
    ("latent", None),
    ("lora", None),
    ("norm", None),
)

# The fraction of all parameters that may be replicated without the table saying so.
MAX_REPLICATED_FRACTION = 0.02


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; an axis of size -1 takes the devices that the others leave.

    With `slices` n > 1 the data axis runs over slices first: its n outermost parts are connected by the data centre
    network, everything else is inside a slice. Raises ConfigError if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = split_into_slices(config.slices, devices)
    sizes = axis_sizes(config, len(devices))
    inside = (sizes["data"] // len(slices), *list(sizes.values())[1:])
    parts = [mesh_utils.create_device_mesh(inside, part, allow_split_physical_axes=True) for part in slices]
    # Under Explicit axes, jax's default, Linen's constraints raise.
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The sizes of the mesh axes on a number of devices. Raises ConfigError if they do not fit it."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    requested = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ConfigError(f"mesh: got {requested}, allowed: sizes whose product is the number of devices, {devices}")
    if sizes["data"] % config.slices:
        raise ConfigError(f"mesh.data: got {sizes['data']}, allowed: a multiple of mesh.slices, {config.slices}")
    return sizes


def default_mesh() -> MeshConfig:
    """The default mesh for the devices that are here, which may be in several TPU slices."""
    slices = len(set(_slice_indices(jax.devices()))) or 1
    return MeshConfig(data=slices, slices=slices)


def split_into_slices(n: int, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each of n slices. CPUs and GPUs are in no slices; they are divided into n equal parts."""
    of_devices = _slice_indices(devices)
    indices = sorted(set(of_devices))
    if indices and len(indices) != n:
        raise ConfigError(f"mesh.slices: got {n}, allowed: {len(indices)}, the number of slices of the devices")
    if indices:
        return [[d for d, i in zip(devices, of_devices, strict=True) if i == index] for index in indices]
    if len(devices) % n:
        raise ConfigError(f"mesh.slices: got {n}, allowed: a divisor of the number of devices, {len(devices)}")
    size = len(devices) // n
    return [list(devices[i : i + size]) for i in range(0, len(devices), size)]


def _slice_indices(devices: Sequence[jax.Device]) -> list[int]:
    """The slice that each device reports; empty if they report none. What a GPU reports is a node, and not a slice."""
    return [d.slice_index for d in devices if hasattr(d, "slice_index") and d.platform != "gpu"]


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes this the current mesh: inside, the model's logical axis names mean its axes."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def axis_size(name: str) -> int:
    """Devices along an axis of the current mesh; 1 without one."""
    return _mesh_in_use().get(name, 1)


def platform() -> str:
    """The platform of the current mesh, which may be one that is only compiled for; without one, of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_nvidia() -> bool:
    """Whether the platform is a GPU of NVIDIA's from the A100 on, for which there are kernels."""
    if platform() not in ("gpu", "cuda"):
        return False
    if jax.default_backend() not in ("gpu", "cuda"):
        return True  # one that `mythos compile` compiles for
    return re.match(r"([89]|1\d)\.", str(jax.local_devices()[0].compute_capability)) is not None  # AMD's is a name


def in_use() -> bool:
    """Whether the current mesh, as set by `use_mesh`, has more than one device."""
    return math.prod(_mesh_in_use().values()) > 1


def _mesh_in_use() -> Mapping[str, int]:
    return jax.sharding.get_abstract_mesh().shape if nn.get_logical_axis_rules() else {}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains x on the current mesh by the logical names of its axes; without a mesh, returns it unchanged."""
    if not _mesh_in_use():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, names))


def partition_spec(
    shape: Sequence[int], names: Sequence[str | None], mesh: Mapping[str, int] | None = None, rules: Any = None
) -> PartitionSpec:
    """The mesh axes over which each dimension is divided by the rules; those that do not divide it are left out.

    mesh: axis sizes by name (default: of the current mesh). rules: default: those of the current mesh.
    """
    mesh = _mesh_in_use() if mesh is None else mesh
    rules = nn.get_logical_axis_rules() if rules is None else rules
    spec: list[Any] = []
    for size, axes in zip(shape, nn.logical_to_mesh_axes(tuple(names), rules) or (), strict=True):
        dividing: tuple[str, ...] = ()
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if mesh.get(axis, 1) > 1 and size % (mesh[axis] * math.prod(mesh[a] for a in dividing)) == 0:
                dividing += (axis,)
        spec.append(dividing[0] if len(dividing) == 1 else dividing or None)
    return PartitionSpec(*spec)


def mesh_axes(spec: Sequence[Any] | PartitionSpec) -> set[str]:
    """All mesh axes in a spec, or in part of one."""
    return {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}


def initialise(make: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    """Runs `make` under jit with sharded outputs, so that no device ever holds a full copy. Returns unboxed arrays."""
    make = jax.jit(make, inline=True)  # so that it is traced once
    with use_mesh(mesh):
        out_shardings = shardings(mesh, jax.eval_shape(make, *arguments))
        return jax.jit(lambda *a: nn.unbox(make(*a)), out_shardings=out_shardings)(*arguments)


def abstract(make: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    """What `initialise` would return, as shapes and dtypes with shardings; nothing runs."""
    make = jax.jit(make, inline=True)  # so that it is traced once
    with use_mesh(mesh):
        out_shardings = shardings(mesh, jax.eval_shape(make, *arguments))
        arrays = jax.eval_shape(lambda *a: nn.unbox(make(*a)), *arguments)
    return placed_shapes(arrays, out_shardings)


def placed_shapes(arrays: Any, places: Any) -> Any:
    """The shapes and dtypes of arrays, concrete or abstract, with these shardings."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays, places)


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """The sharding of each array in a tree whose leaves have logical axis names, by the rules."""

    def sharding(leaf: Any) -> Any:
        if _is_boxed(leaf) and not jax.tree.leaves(leaf.value):
            return leaf.value  # optax's placeholder for a weight that another optimizer updates
        return NamedSharding(mesh, partition_spec(*_shape_and_names(leaf), mesh.shape, RULES))

    return jax.tree.map(sharding, boxed, is_leaf=_is_boxed)


def check_sharded(mesh: Mesh | AbstractMesh, boxed: Any) -> None:
    """Raises ConfigError if more than 2 % of the parameters are replicated by accident on a mesh that divides weights.

    A parameter is replicated on purpose if all its axes are named and the table maps none of them to an axis of this
    mesh. By accident, an axis has no name or the mesh does not divide the dimension.
    """
    dividing = [axis for axis in WEIGHT_AXES if mesh.shape[axis] > 1]
    if not dividing:
        return
    total = 0
    accidental: dict[str, tuple[int, tuple[int, ...]]] = {}  # size and shape by name
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_boxed):
        shape, names = _shape_and_names(leaf)
        size = math.prod(shape)
        total += size
        by_table = mesh_axes(nn.logical_to_mesh_axes(names, RULES) or ()) & set(dividing)
        on_purpose = None not in names and not by_table
        if not on_purpose and not mesh_axes(partition_spec(shape, names, mesh.shape, RULES)) & set(dividing):
            accidental[".".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))] = (size, shape)
    replicated = sum(size for size, _ in accidental.values())
    if replicated > MAX_REPLICATED_FRACTION * total:
        name, (_, shape) = max(accidental.items(), key=lambda item: item[1][0])
        sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in dividing)
        raise ConfigError(
            f"mesh: {replicated / total:.1%} of the parameters would be replicated on every device, allowed: "
            f"{MAX_REPLICATED_FRACTION:.0%}; the largest is {name} {list(shape)}, which {sizes} does not divide"
        )


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _shape_and_names(leaf: Any) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    if _is_boxed(leaf):
        return leaf.value.shape, leaf.names
    return leaf.shape, (None,) * len(leaf.shape)


def device_bytes(tree: Any) -> int:
    """Bytes on each device of a tree of arrays, real or abstract, that have shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def replicate(tree: Any) -> Any:
    """Under jit, on the current mesh: arrays that every process can read in full."""
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())
