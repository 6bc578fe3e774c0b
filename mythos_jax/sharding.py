"""Where arrays live: the device mesh, the one table from logical axis names to mesh axes, and shardings by it.

Weights and activations carry logical names (`embed`, `heads`, `batch`, …) in the model. `constrain` and `axis_size`
look at the mesh in use; without one they do nothing. The table is explained in docs/sharding.md.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "expert", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")
WEIGHT_AXES = ("fsdp", "tensor", "expert")

# logical name -> mesh axes. None: whole on every device, on purpose. Every name in the model stands here.
RULES: tuple[tuple[str, Any], ...] = (
    # Activations.
    ("batch", BATCH_AXES),
    ("length", "sequence"),
    ("keys", None),  # keys and values: queries cut by `sequence` look at all of them
    ("cache_length", "sequence"),  # positions of a stored cache
    ("act_embed", None),  # the residual stream is whole on every device of a tensor group
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    ("slots", None),  # of a cache
    # Weights: fsdp cuts the model width, tensor cuts heads, hidden width and vocabulary, expert cuts experts. What is
    # no expert has its width cut by the expert axis too: else each expert group would keep all of it.
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

# Of the elements of all parameters, so many may be replicated without being declared so.
REPLICATED_SHARE = 0.02


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; the axis that is -1 takes what the others leave. Raises ConfigError where none fits.

    With `slices` n > 1 the data axis runs over slices first: its outermost n parts are joined by the data centre
    network, everything else lies inside a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    wanted = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"mesh: got {wanted}, allowed: sizes whose product is the number of devices, {len(devices)}")
    slices = in_slices(config.slices, devices)
    if sizes["data"] % len(slices):
        raise ConfigError(f"mesh.data: got {sizes['data']}, allowed: a multiple of mesh.slices, {len(slices)}")
    inside = (sizes["data"] // len(slices), *list(sizes.values())[1:])
    parts = [mesh_utils.create_device_mesh(inside, part, allow_split_physical_axes=True) for part in slices]
    # Auto axes: Linen's constraints raise under Explicit ones.
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def in_slices(n: int, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each of n slices. Where they do not say (CPU, GPU), equal parts in their order stand for them."""
    told = sorted({device.slice_index for device in devices if hasattr(device, "slice_index")})
    if told and len(told) != n:
        raise ConfigError(f"mesh.slices: got {n}, allowed: {len(told)}, the slices that the devices are on")
    if told:
        return [[device for device in devices if device.slice_index == index] for index in told]
    if len(devices) % n:
        raise ConfigError(f"mesh.slices: got {n}, allowed: a divisor of the number of devices, {len(devices)}")
    size = len(devices) // n
    return [list(devices[i : i + size]) for i in range(0, len(devices), size)]


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside, logical names in the model mean axes of this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh in use; 1 without one."""
    return _mesh_in_use().get(name, 1)


def platform() -> str:
    """Of the mesh in use, also of one that is only compiled for; else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def in_use() -> bool:
    """Whether a mesh of more than one device, and rules, are in use."""
    return math.prod(_mesh_in_use().values()) > 1


def _mesh_in_use() -> Mapping[str, int]:
    return jax.sharding.get_abstract_mesh().shape if nn.get_logical_axis_rules() else {}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, placed by the logical names of its axes on the mesh in use; as it is without one."""
    if not _mesh_in_use():
        return x
    return jax.lax.with_sharding_constraint(x, placement(x.shape, names))


def placement(
    shape: Sequence[int], names: Sequence[str | None], mesh: Mapping[str, int] | None = None, rules: Any = None
) -> PartitionSpec:
    """The mesh axes that cut each dimension, by the rules; an axis that does not divide a dimension leaves it whole.

    mesh: sizes by name. By default, of the mesh in use.
    """
    mesh = _mesh_in_use() if mesh is None else mesh
    rules = nn.get_logical_axis_rules() if rules is None else rules
    cuts = []
    for size, axes in zip(shape, nn.logical_to_mesh_axes(tuple(names), rules), strict=True):
        kept: tuple[str, ...] = ()
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if mesh.get(axis, 1) > 1 and size % (mesh[axis] * math.prod(mesh[a] for a in kept)) == 0:
                kept += (axis,)
        cuts.append(kept[0] if len(kept) == 1 else kept or None)
    return PartitionSpec(*cuts)


def mesh_axes(spec: Sequence[Any] | PartitionSpec) -> set[str]:
    """All mesh axes in a spec, or in part of one."""
    return {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}


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

    def place(leaf: Any) -> Any:
        if _is_boxed(leaf) and not jax.tree.leaves(leaf.value):
            return leaf.value  # optax's mark for a weight that another optimizer moves
        return NamedSharding(mesh, placement(*_shape_and_names(leaf), mesh.shape, RULES))

    return jax.tree.map(place, boxed, is_leaf=_is_boxed)


def check_sharded(mesh: Mesh, boxed: Any) -> None:
    """Raises ConfigError when, on a mesh that cuts weights, over 2 % of the parameters are replicated undeclared.

    Declared is what the table says: a parameter all of whose axes have names, none of which the table gives to an axis
    that this mesh has. What is left: axes without a name, and dimensions that the mesh does not divide.
    """
    cutting = [axis for axis in WEIGHT_AXES if mesh.shape[axis] > 1]
    if not cutting:
        return
    total, found = 0, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_boxed):
        shape, names = _shape_and_names(leaf)
        size = math.prod(shape)
        total += size
        wanted = mesh_axes(nn.logical_to_mesh_axes(names, RULES)) & set(cutting)
        declared = None not in names and not wanted
        if not declared and not mesh_axes(placement(shape, names, mesh.shape, RULES)) & set(cutting):
            found[".".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))] = (size, shape)
    replicated = sum(size for size, _ in found.values())
    if replicated > REPLICATED_SHARE * total:
        name, (_, shape) = max(found.items(), key=lambda item: item[1][0])
        sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in cutting)
        raise ConfigError(
            f"mesh: {replicated / total:.1%} of the parameters would be replicated on every device, allowed: "
            f"{REPLICATED_SHARE:.0%}; the largest is {name} {list(shape)}, which {sizes} does not cut"
        )


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _shape_and_names(leaf: Any) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
    if _is_boxed(leaf):
        return leaf.value.shape, leaf.names
    return leaf.shape, (None,) * len(leaf.shape)


def replicate(tree: Any) -> Any:
    """Under jit, on the current mesh: arrays that every process can read in full."""
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())
