"""Weights stored in fewer bits than products are computed in: int8 with a scale per output channel, or bfloat16.

Decoding is bound by reading the weights, so a product must read them as they are stored. TPUs widen them on the way
into the product. XLA's CPU backend would first write the widened weights to memory, which takes longer than reading
float32 ones. On a CPU it is therefore the activations that are made narrow: each row becomes two rows of the weights'
type, high and low, which together hold at least 15 bits of it, and a product of narrow matrices multiplies both
(docs/speed.md).

Shape letters: N rows, I summed over, O outputs, G groups, each with a matrix of its own (heads, experts).
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.ops.matmul import matmul
from mythos_jax.sharding import in_use, platform

INT8_MAX = 127
# Up to this many rows a CPU multiplies halves; for more, widening the weights once takes less time.
MAX_SPLIT_ROWS = 128


class Narrow(struct.PyTreeNode):
    """The weight values * scale.

    values: int8, bfloat16 or float16. scale: float32, with the axes of `values`, of size 1 where products sum over
    them; None for floating point.
    """

    values: jax.Array
    scale: jax.Array | None = None

    def widened(self, dtype: jnp.dtype) -> jax.Array:
        wide = self.values.astype(dtype)
        return wide if self.scale is None else (wide * self.scale).astype(dtype)


Matrix: TypeAlias = jax.Array | Narrow


def wide(w: Matrix, dtype: jnp.dtype) -> jax.Array:
    """A weight in `dtype`, however it is stored."""
    return w.widened(dtype) if isinstance(w, Narrow) else w.astype(dtype)


def some_outputs(w: Matrix, channels: slice) -> Matrix:
    """Part of the channels of the last axis."""
    return jax.tree.map(lambda part: part[..., channels], w)


def narrow_product(x: jax.Array, w: Narrow, axes: str) -> jax.Array:
    """[N, I] or [G, N, I] times a weight: float32 [N, O] or [G, N, O].

    axes: the letters of the axes of the weight, such as "IO" or "GIO".
    """
    y = _product(x, w.values, axes)
    return y if w.scale is None else y * jnp.squeeze(w.scale, axes.index("I"))[..., None, :]


def _product(x: jax.Array, values: jax.Array, axes: str) -> jax.Array:
    """`narrow_product` without the scale."""
    rows, result = ("GNI", "GNO") if "G" in axes else ("NI", "NO")
    # XLA's CPU backend cannot multiply groups of bfloat16 matrices into float32.
    kinds = (jnp.int8,) if "G" in axes else (jnp.int8, jnp.bfloat16)
    halves = values.dtype in kinds and x.dtype == jnp.float32 and x.shape[-2] <= MAX_SPLIT_ROWS
    on_one_cpu = platform() == "cpu" and not in_use()
    if not (halves and on_one_cpu):
        values = _widen_late(values, x) if on_one_cpu else values
        return jnp.einsum(f"{rows},{axes}->{result}", x, values.astype(x.dtype), preferred_element_type=jnp.float32)
    if values.dtype == jnp.int8:
        size = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny) / INT8_MAX
        high = jnp.round(x / size)
        low = jnp.round((x / size - high) * 2 * INT8_MAX)
        size_of_low, sums = 1 / (2 * INT8_MAX), jnp.int32
    else:
        high = x.astype(jnp.bfloat16).astype(jnp.float32)
        size, low, size_of_low, sums = jnp.float32(1), x - high, 1.0, jnp.float32
    both = jnp.stack([high, low]).astype(values.dtype)  # one row alone has no fast kernel
    y = jnp.einsum(f"Z{rows},{axes}->Z{result}", both, values, preferred_element_type=sums)
    return (y[0].astype(jnp.float32) + y[1].astype(jnp.float32) * size_of_low) * size


def _widen_late(values: jax.Array, x: jax.Array) -> jax.Array:
    """The values, which seem to depend on x: else XLA would widen the weights of all layers before the first product,
    and hold them in memory together."""
    first = x.reshape(-1)[0]
    never = (first != first) & (first < 0)  # and no compiler can prove it
    return jnp.where(never, jnp.zeros_like(values), values)


def linear(x: jax.Array, w: Matrix, axes: int = 1) -> jax.Array:
    """x w, contracted over the last `axes` axes of x and the first `axes` axes of w, in x's dtype."""
    if not isinstance(w, Narrow):
        return matmul(x, w, axes)
    inputs, outputs = w.values.shape[:axes], w.values.shape[axes:]
    if in_use():  # flattening would merge axes that the mesh cuts
        y = jnp.tensordot(x, w.values.astype(x.dtype), axes, preferred_element_type=jnp.float32)
        return (y if w.scale is None else y * w.scale.reshape(outputs)).astype(x.dtype)
    flat = jax.tree.map(lambda part: part.reshape(math.prod(part.shape[:axes]), -1), w)
    y_NO = narrow_product(x.reshape(-1, math.prod(inputs)), flat, "IO")
    return y_NO.reshape(*x.shape[: x.ndim - axes], *outputs).astype(x.dtype)


def linear_to_heads(x_BTI: jax.Array, w_IHO: Matrix) -> jax.Array:
    """Every head's channels, [B, T, H, O], from what all heads share."""
    if not isinstance(w_IHO, Narrow):  # as a product that rematerialisation may save, which `linear` hides from it
        return jnp.einsum("BTI,IHO->BTHO", x_BTI, w_IHO)
    return linear(x_BTI, w_IHO)


def linear_per_head(x_BTHI: jax.Array, w: Matrix, axes: str) -> jax.Array:
    """Each head's channels times its own matrix, [B, T, H, O]. axes: of w, "IHO" or, the other way round, "OHI"."""
    if not isinstance(w, Narrow) or in_use():
        return jnp.einsum(f"BTHI,{axes}->BTHO", x_BTHI, wide(w, x_BTHI.dtype))
    B, T, H, _ = x_BTHI.shape
    if axes == "OHI" and w.scale is not None:  # the scale is along what is summed over here
        x_BTHI, w = x_BTHI * w.scale[0].astype(x_BTHI.dtype), Narrow(w.values)
    x_HNI = jnp.moveaxis(x_BTHI, 2, 0).reshape(H, B * T, -1)
    y_HNO = narrow_product(x_HNI, w, axes.replace("H", "G"))
    return jnp.moveaxis(y_HNO.reshape(H, B, T, -1), 0, 2).astype(x_BTHI.dtype)


def logits(features_BTD: jax.Array, table_VD: Matrix) -> jax.Array:
    """Float32 [B, T, V]."""
    if not isinstance(table_VD, Narrow) or in_use():
        table_VD = wide(table_VD, features_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", features_BTD, table_VD, preferred_element_type=jnp.float32)
    logits_NV = narrow_product(features_BTD.reshape(-1, features_BTD.shape[-1]), table_VD, "OI")
    return logits_NV.reshape(*features_BTD.shape[:-1], -1)
