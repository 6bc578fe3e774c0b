"""Products of training with both operands in 8 bits, int8 or float8, which some chips multiply twice as fast as
bfloat16 (docs/training.md).

Weights stay as they are: a product rounds its operands when it is computed. Each row of what is multiplied and each
channel of the result has a scale of its own, such that its largest number becomes the largest of the type. Sums of int8
products are exact, sums of float8 products are float32. The gradient is that of the product without rounding
("straight through"). Of its two products, the one for the activations is in 8 bits too: the incoming gradient is
rounded per row, in float8 to a type with a larger range. The weight's own gradient, a sum over all tokens, is not.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.ops.matmul import flatten
from mythos_jax.ops.narrow import INT8_MAX
from mythos_jax.sharding import in_use

Kind = Literal["int8", "fp8"]

# The types of weights and activations, and of gradients of activations.
FORWARD = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
BACKWARD = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}
# A row of numbers below this has the scale of this number: a smaller scale would not be a normal float32.
SMALLEST = 1e-30


def quantize(x: jax.Array, axes: Sequence[int], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Values of an 8-bit type and float32 scales, of size 1 along `axes`, over which they are shared; values * scale
    is nearest to x."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    largest = INT8_MAX if is_integer else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    # Not divided by `largest`: XLA would multiply by the reciprocal on some platforms, which rounds otherwise.
    scale = jnp.maximum(jnp.abs(x).max(axes, keepdims=True), SMALLEST) * np.float32(1 / largest)
    scaled = x / scale
    return (jnp.round(scaled) if is_integer else scaled).astype(dtype), scale


def _product(
    a: jax.Array, b: jax.Array, a_axes: Sequence[int], b_axes: Sequence[int], a_dtype: jnp.dtype, b_dtype: jnp.dtype
) -> jax.Array:
    """a b, contracted over these axes, of operands rounded to these types; float32."""
    dtype = a.dtype
    (a, a_scale), (b, b_scale) = quantize(a, a_axes, a_dtype), quantize(b, b_axes, b_dtype)
    # Already in the dtype of the result: a GPU writes the sums to memory before it multiplies them with the scales.
    sums = jnp.int32 if a.dtype == jnp.int8 else dtype
    y = jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=sums).astype(dtype)
    a_scale = jnp.squeeze(a_scale, a_axes)
    return y * a_scale.reshape(*a_scale.shape, *[1] * (y.ndim - a_scale.ndim)) * jnp.squeeze(b_scale, b_axes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_matmul(x: jax.Array, w: jax.Array, axes: int, kind: Kind) -> jax.Array:
    """`matmul` in 8 bits: x w in x's dtype, contracted over the last `axes` axes of x and the first `axes` of w."""
    shape = *x.shape[: x.ndim - axes], *w.shape[axes:]
    if not in_use():
        (x, w), axes = flatten(x, w, axes), 1
    y = _product(x, w, range(x.ndim - axes, x.ndim), range(axes), FORWARD[kind], FORWARD[kind])
    return y.astype(x.dtype).reshape(shape)


def _forward(x: jax.Array, w: jax.Array, axes: int, kind: Kind) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return quantized_matmul(x, w, axes, kind), (x, w)


def _backward(
    axes: int, kind: Kind, residuals: tuple[jax.Array, jax.Array], ct: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    shapes = x.shape, w.shape
    if not in_use():
        (x, w), axes = flatten(x, w, axes), 1
        ct = ct.reshape(-1, w.shape[1])
    tokens, outputs = range(x.ndim - axes), range(x.ndim - axes, ct.ndim)
    dx = _product(ct, w, outputs, range(axes, w.ndim), BACKWARD[kind], FORWARD[kind]).astype(x.dtype)
    dw = jax.lax.dot_general(x, ct, ((tokens, tokens), ((), ())))
    return dx.reshape(shapes[0]), dw.reshape(shapes[1])


quantized_matmul.defvjp(_forward, _backward)
