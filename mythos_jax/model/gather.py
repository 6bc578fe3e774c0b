"""Weights that the mesh cuts (FSDP): when and how they are gathered for a product.

Outside the loop a weight is gathered where it is used. The loop's weights are used once per loop, so there are two
ways (`mesh.gather`, docs/sharding.md): `once` gathers all of them before the first loop, `per_loop` in every loop,
which holds one layer's whole weights at a time.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.ops.narrow import Narrow, Stored
from mythos_jax.ops.products import LowRank, Matrix
from mythos_jax.sharding import axis_size, constrain

# The collection of gathered copies of the loop's weights in the compute dtype.
GATHERED = "gathered"
# The collection of the scales of weights that are stored as int8, under the names of those weights.
SCALES = "scales"
# The collection of low-rank weights {"a", "b"} beside frozen matrices, under their names (model/low_rank.py).
LOW_RANK = "low_rank"


class Weight(nn.LogicallyPartitioned):
    """The box of a parameter that is multiplied with activations: it also says which of its axes are summed over."""

    inputs: tuple[int, ...] = struct.field(default=(), pytree_node=False)


def weight_init(std: float, axes: tuple[str | None, ...], inputs: tuple[int, ...]) -> Any:
    """Normal initialisation of a `Weight` whose axes carry these logical names (see `sharding.py`)."""

    def init(*arguments: Any) -> Weight:
        return Weight(nn.initializers.normal(std)(*arguments), axes, inputs=inputs)

    return init


def stored_weight(module: nn.Module, name: str, stored: jax.Array, dtype: jnp.dtype) -> Stored:
    """A weight as it is stored, if that is narrower than `dtype`; else in `dtype`."""
    if module.has_variable(SCALES, name):
        return Narrow(stored, module.get_variable(SCALES, name))
    if stored.dtype.itemsize < jnp.dtype(dtype).itemsize:
        return Narrow(stored)
    return stored.astype(dtype)


def sharded_weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
    dtype: jnp.dtype,
    inputs: tuple[int, ...],
    gather: bool = True,
) -> Stored:
    """A normally initialised matrix parameter, made in float32; returned in `dtype`, or as it is stored if that is
    narrower, and gathered along `embed`.

    inputs: the axes that products sum over. gather: false to leave a weight cut as it is stored, unless it has a
    gathered copy.
    """
    stored = module.param(name, weight_init(std, axes, inputs), shape, jnp.float32)
    if module.has_variable(GATHERED, name):
        copy: jax.Array = module.get_variable(GATHERED, name)
        return copy_with_gradient(stored, copy) if copy.dtype == dtype else stored_weight(module, name, copy, dtype)

    def gathered(part: jax.Array) -> jax.Array:
        cut = constrain(part, *axes)
        return constrain(cut, *_gathered(axes)) if gather else cut

    # Cast before it is gathered, so that half the bytes travel.
    return jax.tree.map(gathered, stored_weight(module, name, stored, dtype))


def adaptable_weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
    dtype: jnp.dtype,
    inputs: int,
) -> Matrix:
    """`sharded_weight` of a matrix that products sum over the first `inputs` axes of, with its low-rank weights in
    `dtype` if there are any."""
    base = sharded_weight(module, name, shape, axes, std, dtype, tuple(range(inputs)))
    if not module.has_variable(LOW_RANK, name):
        return base
    parts: dict[str, jax.Array] = module.get_variable(LOW_RANK, name)
    names = low_rank_axes(axes, inputs)
    return LowRank(base, **{part: constrain(x.astype(dtype), *_gathered(names[part])) for part, x in parts.items()})


def width_axis(module: nn.Module, name: str) -> str:
    """The logical name of the width of a weight that was asked for with `gather` false."""
    return "act_embed" if module.has_variable(GATHERED, name) else "embed"


def gather_loop_weights(variables: dict[str, Any], boxed: dict[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """Variables whose loop weights are cast to `dtype` and gathered once, before the first loop.

    boxed: the model's abstract variables, with logical axes. Products use a copy in `dtype`, or as it is stored if that
    is narrower (collection `gathered`). The gathered float32 weight only accumulates the gradients of all loops, so
    that they are reduced over devices once; so do low-rank weights, where there are any.
    """
    if axis_size("fsdp") * axis_size("expert") == 1 and dtype == jnp.float32:
        return variables  # neither cut nor cast
    # Only the loop: prelude and coda use each weight once, so gathering early would save nothing.
    params, boxes = variables["params"], boxed["params"]["recurrence"]["cell"]
    loop = nn.unbox(params["recurrence"]["cell"])

    def gather(box: Any, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        axes = box.names if isinstance(box, nn.LogicallyPartitioned) else (None,) * x.ndim
        return constrain(x.astype(dtype) if x.dtype.itemsize > dtype.itemsize else x, *_gathered(axes))

    def all_as(dtype: jnp.dtype) -> Any:
        is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
        return jax.tree.map(lambda box, x: gather(box, x, jnp.dtype(dtype)), boxes, loop, is_leaf=is_box)

    # The copy carries no gradient; `copy_with_gradient` sends it to the float32 weight.
    copies = jax.lax.stop_gradient(all_as(dtype))
    gathered = {
        **variables,
        "params": {**params, "recurrence": {**params["recurrence"], "cell": all_as(jnp.float32)}},
        GATHERED: {"recurrence": {"cell": copies}},
    }
    low_rank = variables.get(LOW_RANK, {})
    if cell := low_rank.get("recurrence", {}).get("cell"):
        gathered[LOW_RANK] = {**low_rank, "recurrence": {"cell": _gather_low_rank(boxes, cell)}}
    return gathered


def _gather_low_rank(boxes: Any, tree: Any) -> Any:
    if isinstance(boxes, Weight):
        axes = low_rank_axes(boxes.names, len(boxes.inputs))
        return {name: constrain(x, *_gathered(axes[name])) for name, x in tree.items()}
    return {name: _gather_low_rank(boxes[name], part) for name, part in tree.items()}


def low_rank_axes(axes: tuple[str | None, ...], inputs: int) -> dict[str, tuple[str | None, ...]]:
    """Logical names of the axes of a and b beside a matrix whose first `inputs` axes are summed over: each is cut as
    the matrix is."""
    return {"a": (*axes[:inputs], "lora"), "b": ("lora", *axes[inputs:])}


def prevent_hoisting(call: Callable[..., Any]) -> Callable[..., Any]:
    """The cell's call with weights that seem to depend on the loop, so that no compiler gathers them before the first.

    XLA moves whatever is the same in every loop out of it, also past an optimization barrier (seen on CPU and TPU).
    """

    def run(cell: nn.Module, carry: Any, *arguments: Any) -> Any:
        # False always, and no compiler can prove it: counts of loops are never negative.
        never = (carry.tokens.loops_BT < 0).any()

        def tie(variables: Any) -> Any:
            return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), variables)

        return nn.map_variables(call, "params", trans_in_fn=tie)(cell, carry, *arguments)

    return run


@jax.custom_vjp
def copy_with_gradient(stored: jax.Array, copy: jax.Array) -> jax.Array:
    """The copy's value; the gradient flows to the stored weight, in its dtype."""
    return copy


copy_with_gradient.defvjp(lambda stored, copy: (copy, None), lambda _, ct: (ct.astype(jnp.float32), None))


def _gathered(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple("act_embed" if axis == "embed" else axis for axis in axes)
