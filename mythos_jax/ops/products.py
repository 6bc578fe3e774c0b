"""Products of activations with a weight, in whatever form it is: an array, one in fewer bits (`Narrow`), or one with
low-rank weights beside it (`LowRank`)."""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config.model import Products
from mythos_jax.ops.matmul import frozen_matmul, matmul
from mythos_jax.ops.narrow import Narrow, Stored, narrow_product, wide
from mythos_jax.ops.quantized import quantized_matmul
from mythos_jax.sharding import in_use


class LowRank(struct.PyTreeNode):
    """The weight base + a b, of which only a and b have a gradient (LoRA, arXiv 2106.09685). The sum is never built: a
    product is x base + (x a) b.

    base: [*inputs, *outputs]. a: [*inputs, R]. b: [R, *outputs].
    """

    base: Stored
    a: jax.Array
    b: jax.Array


Matrix: TypeAlias = Stored | LowRank


def some_outputs(w: Matrix, channels: slice) -> Matrix:
    """Part of the channels of the last axis."""
    if isinstance(w, LowRank):
        return LowRank(_some_outputs(w.base, channels), w.a, w.b[..., channels])
    return _some_outputs(w, channels)


def _some_outputs(w: Stored, channels: slice) -> Stored:
    cut: Stored = jax.tree.map(lambda part: part[..., channels], w)
    return cut


def linear(x: jax.Array, w: Matrix, axes: int = 1, products: Products = "dtype") -> jax.Array:
    """x w, contracted over the last `axes` axes of x and the first `axes` axes of w, in x's dtype.

    products: what x and w are rounded to, where w is not stored in fewer bits already.
    """
    if isinstance(w, LowRank):
        low = matmul(matmul(x, w.a, axes), w.b)
        if isinstance(w.base, Narrow) or products != "dtype":
            return linear(x, _frozen(w.base), axes, products) + low
        return frozen_matmul(x, w.base, axes) + low
    if isinstance(w, Narrow):
        return _narrow_linear(x, w, axes)
    return matmul(x, w, axes) if products == "dtype" else quantized_matmul(x, w, axes, products)


def _narrow_linear(x: jax.Array, w: Narrow, axes: int) -> jax.Array:
    inputs, outputs = w.values.shape[:axes], w.values.shape[axes:]
    if in_use():  # flattening would merge axes that the mesh cuts
        y = jnp.tensordot(x, w.values.astype(x.dtype), axes, preferred_element_type=jnp.float32)
        return (y if w.scale is None else y * w.scale.reshape(outputs)).astype(x.dtype)
    flat = jax.tree.map(lambda part: part.reshape(math.prod(part.shape[:axes]), -1), w)
    y_NO = narrow_product(x.reshape(-1, math.prod(inputs)), flat, "IO")
    return y_NO.reshape(*x.shape[: x.ndim - axes], *outputs).astype(x.dtype)


def linear_to_heads(x_BTI: jax.Array, w_IHO: Matrix, products: Products = "dtype") -> jax.Array:
    """Every head's channels, [B, T, H, O], from what all heads share. products: as in `linear`."""
    if products != "dtype":
        return linear(x_BTI, w_IHO, products=products)
    if isinstance(w_IHO, LowRank):
        low_BTR = matmul(x_BTI, w_IHO.a)
        return linear_to_heads(x_BTI, _frozen(w_IHO.base)) + linear_to_heads(low_BTR, w_IHO.b)
    if not isinstance(w_IHO, Narrow):  # as a product that rematerialisation may save, which `linear` hides from it
        return jnp.einsum("BTI,IHO->BTHO", x_BTI, w_IHO)
    return linear(x_BTI, w_IHO)


def linear_per_head(x_BTHI: jax.Array, w: Matrix, axes: str) -> jax.Array:
    """Each head's channels times its own matrix, [B, T, H, O]. axes: of w, "IHO" or, the other way round, "OHI"."""
    if isinstance(w, LowRank):
        y_BTHO = linear_per_head(x_BTHI, _frozen(w.base), axes)
        if axes == "IHO":
            return y_BTHO + jnp.einsum("BTHR,RHO->BTHO", jnp.einsum("BTHI,IR->BTHR", x_BTHI, w.a), w.b)
        return y_BTHO + jnp.einsum("BTHR,OR->BTHO", jnp.einsum("BTHI,RHI->BTHR", x_BTHI, w.b), w.a)
    if not isinstance(w, Narrow) or in_use():
        return jnp.einsum(f"BTHI,{axes}->BTHO", x_BTHI, wide(w, x_BTHI.dtype))
    B, T, H, _ = x_BTHI.shape
    if axes == "OHI" and w.scale is not None:  # the scale is along what is summed over here
        x_BTHI, w = x_BTHI * w.scale[0].astype(x_BTHI.dtype), Narrow(w.values)
    x_HNI = jnp.moveaxis(x_BTHI, 2, 0).reshape(H, B * T, -1)
    y_HNO = narrow_product(x_HNI, w, axes.replace("H", "G"))
    return jnp.moveaxis(y_HNO.reshape(H, B, T, -1), 0, 2).astype(x_BTHI.dtype)


def _frozen(w: Stored) -> Stored:
    frozen: Stored = jax.tree.map(jax.lax.stop_gradient, w)
    return frozen


def logits(features_BTD: jax.Array, table_VD: Stored) -> jax.Array:
    """Float32 [B, T, V]."""
    if not isinstance(table_VD, Narrow) or in_use():
        table_VD = wide(table_VD, features_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", features_BTD, table_VD, preferred_element_type=jnp.float32)
    logits_NV = narrow_product(features_BTD.reshape(-1, features_BTD.shape[-1]), table_VD, "OI")
    return logits_NV.reshape(*features_BTD.shape[:-1], -1)
