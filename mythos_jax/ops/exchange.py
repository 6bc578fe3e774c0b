"""Rows that each device sends to others, as many as it likes to each: a ragged all-to-all, with its gradient."""

from functools import partial

import jax
import jax.numpy as jnp

from mythos_jax.sharding import platform


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def exchange(axis: str, most: int, x_ND: jax.Array, sizes_SR: jax.Array) -> jax.Array:
    """What comes from all devices along the axis, ordered by sender, then zeros: [most, D]. Inside a `shard_map`.

    x_ND: this device's rows, ordered by the device they go to; rows behind those that are sent stay here.
    sizes_SR: int32, rows from each sender to each receiver, the same on every device. most: at least as many rows as
    come. TPUs and GPUs have a collective for it; a CPU has none (jax 0.10), so there everything is gathered and each
    device takes its part.
    """
    return (_gathered if platform() == "cpu" else _ragged)(axis, most, x_ND, sizes_SR)


def _forward(axis: str, most: int, x_ND: jax.Array, sizes_SR: jax.Array) -> tuple[jax.Array, tuple[int, jax.Array]]:
    return exchange(axis, most, x_ND, sizes_SR), (x_ND.shape[0], sizes_SR)


def _backward(axis: str, most: int, kept: tuple[int, jax.Array], ct: jax.Array) -> tuple[jax.Array, None]:
    rows, sizes_SR = kept
    return exchange(axis, rows, ct, sizes_SR.T), None


exchange.defvjp(_forward, _backward)


def _starts(sizes: jax.Array, axis: int) -> jax.Array:
    return (jnp.cumsum(sizes, axis) - sizes).astype(sizes.dtype)


def _ragged(axis: str, most: int, x_ND: jax.Array, sizes_SR: jax.Array) -> jax.Array:
    me = jax.lax.axis_index(axis)
    return jax.lax.ragged_all_to_all(
        x_ND,
        jnp.zeros((most, x_ND.shape[1]), x_ND.dtype),
        _starts(sizes_SR, 1)[me],  # of what goes to each receiver, here
        sizes_SR[me],
        _starts(sizes_SR, 0)[me],  # of what comes from here, at each receiver
        sizes_SR[:, me],
        axis_name=axis,
    )


def _gathered(axis: str, most: int, x_ND: jax.Array, sizes_SR: jax.Array) -> jax.Array:
    me = jax.lax.axis_index(axis)
    all_SND = jax.lax.all_gather(x_ND, axis)
    ends_S = jnp.cumsum(sizes_SR[:, me])
    row = jnp.arange(most)
    sender = jnp.minimum(jnp.searchsorted(ends_S, row, side="right"), len(ends_S) - 1)
    index = _starts(sizes_SR, 1)[sender, me] + row - _starts(sizes_SR, 0)[sender, me]
    return jnp.where((row < ends_S[-1])[:, None], all_SND[sender, jnp.minimum(index, x_ND.shape[0] - 1)], 0)
