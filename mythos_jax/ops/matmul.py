"""Matrix products of activations and weights, over any number of contracted axes."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from mythos_jax.sharding import in_use


def matmul(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
    """x w, contracted over the last `axes` axes of x and the first `axes` axes of w.

    On a mesh this is `tensordot`, which XLA partitions: flattening [B, T] would merge two sharded axes. On one device
    both operands are flattened to matrices first, because XLA's CPU backend takes twice as long for the gradient of a
    product over [B, T] (docs/speed.md).
    """
    return jnp.tensordot(x, w, axes) if in_use() else _flat_matmul(x, w, axes)


def frozen_matmul(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
    """`matmul` with a weight that gets no gradient: the backward pass needs the weight alone, so x is not kept."""
    w = jax.lax.stop_gradient(w)
    if in_use():
        return jnp.tensordot(x, w, axes)
    x_NI, w_IO = flatten(x, w, axes)
    return (x_NI @ w_IO).reshape(*x.shape[: x.ndim - axes], *w.shape[axes:])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flat_matmul(x: jax.Array, w: jax.Array, axes: int) -> jax.Array:
    x_NI, w_IO = flatten(x, w, axes)
    return (x_NI @ w_IO).reshape(*x.shape[: x.ndim - axes], *w.shape[axes:])


def _flat_matmul_forward(x: jax.Array, w: jax.Array, axes: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The unflattened x is the residual: all products of one x (q, k and v; gate and up) then share a single copy.
    # Automatic differentiation would keep a flattened copy for each.
    return _flat_matmul(x, w, axes), (x, w)


def _flat_matmul_backward(
    axes: int, residuals: tuple[jax.Array, jax.Array], ct: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    x_NI, w_IO = flatten(x, w, axes)
    ct_NO = ct.reshape(-1, w_IO.shape[1])
    return (ct_NO @ w_IO.T).reshape(x.shape), (x_NI.T @ ct_NO).reshape(w.shape)


_flat_matmul.defvjp(_flat_matmul_forward, _flat_matmul_backward)


def flatten(x: jax.Array, w: jax.Array, axes: int) -> tuple[jax.Array, jax.Array]:
    """x as [N, I] and w as [I, O], where I runs over the contracted axes."""
    size = math.prod(w.shape[:axes])
    return x.reshape(-1, size), w.reshape(size, -1)
