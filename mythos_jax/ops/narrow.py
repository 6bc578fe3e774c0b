"""Weights stored in fewer bits than products are computed in: int8 with a scale per output channel, or bfloat16.

Decoding is bound by reading the weights, so a product must read them as they are stored. TPUs widen them on the way
into the product. XLA's CPU backend would first write the widened weights to memory, which takes longer than reading
float32 ones. On a CPU it is therefore the activations that are made narrow: each row becomes two rows of the weights'
type, high and low, which together hold at least 15 bits of it, and a product of narrow matrices multiplies both
(docs/speed.md).

Shape letters: N rows, I summed over, O outputs, G groups, each with a matrix of its own (heads, experts).
"""

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

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


Stored: TypeAlias = jax.Array | Narrow


def wide(w: Stored, dtype: jnp.dtype) -> jax.Array:
    """A weight in `dtype`, however it is stored."""
    return w.widened(dtype) if isinstance(w, Narrow) else w.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow_product(x: jax.Array, w: Narrow, axes: str) -> jax.Array:
    """[N, I] or [G, N, I] times a weight: float32 [N, O] or [G, N, O].

    axes: the letters of the axes of the weight, such as "IO" or "GIO". Weights that are int8 have no gradient.
    """
    y = _product(x, w.values, axes)
    return y if w.scale is None else y * _row(w.scale, axes)


def _forward(x: jax.Array, w: Narrow, axes: str) -> tuple[jax.Array, tuple[jax.Array, Narrow]]:
    return narrow_product(x, w, axes), (x, w)


def _backward(axes: str, residuals: tuple[jax.Array, Narrow], ct: jax.Array) -> tuple[jax.Array, Narrow | None]:
    # Not the derivative of `_product`, which rounds rows: it would be rounded to the weight's type, or 0 for int8.
    x, w = residuals
    ct_of_values = ct if w.scale is None else ct * _row(w.scale, axes)
    dx = _product(ct_of_values.astype(x.dtype), w.values, axes.translate(_TRANSPOSED)).astype(x.dtype)
    if not jnp.issubdtype(w.values.dtype, jnp.floating):
        return dx, None
    rows, result = _rows(axes)
    dw = jnp.einsum(f"{rows},{result}->{axes}", x, ct_of_values, preferred_element_type=jnp.float32)
    return dx, Narrow(dw.astype(w.values.dtype))


narrow_product.defvjp(_forward, _backward)

_TRANSPOSED = str.maketrans("IO", "OI")


def _row(scale: jax.Array, axes: str) -> jax.Array:
    """The scale of each output, to be multiplied with rows of them."""
    return jnp.squeeze(scale, axes.index("I"))[..., None, :]


def _rows(axes: str) -> tuple[str, str]:
    """The letters of the axes of what is multiplied with a weight, and of the product."""
    return ("GNI", "GNO") if "G" in axes else ("NI", "NO")


def _product(x: jax.Array, values: jax.Array, axes: str) -> jax.Array:
    """`narrow_product` without the scale."""
    rows, result = _rows(axes)
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
