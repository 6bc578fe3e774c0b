"""A ragged all-to-all with a gradient: each device sends any number of rows to each of the others."""

from functools import partial

import jax
import jax.numpy as jnp

from mythos_jax.sharding import platform


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ragged_all_to_all(axis: str, max_rows: int, x_ND: jax.Array, sizes_SR: jax.Array) -> jax.Array:
    """The rows that all devices along `axis` sent to this one, ordered by sender, then zeros: [max_rows, D].

    Call it inside a `shard_map`. x_ND: this device's rows, ordered by receiver; rows beyond the sum of the sizes are
    not sent. sizes_SR: int32, the number of rows from each sender to each receiver, equal on every device. max_rows: an
    upper bound on the number of rows received. TPUs and GPUs have a collective for this. A CPU has none (jax 0.10), so
    there all rows are gathered and each device selects its own.
    """
    return (_by_all_gather if platform() == "cpu" else _by_collective)(axis, max_rows, x_ND, sizes_SR)


def _forward(axis: str, max_rows: int, x_ND: jax.Array, sizes_SR: jax.Array) -> tuple[jax.Array, tuple[int, jax.Array]]:
    return ragged_all_to_all(axis, max_rows, x_ND, sizes_SR), (x_ND.shape[0], sizes_SR)


def _backward(axis: str, max_rows: int, residuals: tuple[int, jax.Array], ct: jax.Array) -> tuple[jax.Array, None]:
    # The gradient of a row goes back to the device that sent it.
    n_rows, sizes_SR = residuals
    return ragged_all_to_all(axis, n_rows, ct, sizes_SR.T), None


ragged_all_to_all.defvjp(_forward, _backward)


def _starts(sizes: jax.Array, axis: int) -> jax.Array:
    """Where each group begins if groups of these sizes are stored one after the other along `axis`."""
    return (jnp.cumsum(sizes, axis) - sizes).astype(sizes.dtype)


def _by_collective(axis: str, max_rows: int, x_ND: jax.Array, sizes_SR: jax.Array) -> jax.Array:
    device = jax.lax.axis_index(axis)
    return jax.lax.ragged_all_to_all(
        x_ND,
        jnp.zeros((max_rows, x_ND.shape[1]), x_ND.dtype),
        _starts(sizes_SR, 1)[device],  # where each receiver's rows start in x_ND
        sizes_SR[device],
        _starts(sizes_SR, 0)[device],  # where this device's rows start in each receiver's output
        sizes_SR[:, device],
        axis_name=axis,
    )


def _by_all_gather(axis: str, max_rows: int, x_ND: jax.Array, sizes_SR: jax.Array) -> jax.Array:
    device = jax.lax.axis_index(axis)
    all_SND = jax.lax.all_gather(x_ND, axis)
    ends_S = jnp.cumsum(sizes_SR[:, device])
    row = jnp.arange(max_rows)
    sender = jnp.minimum(jnp.searchsorted(ends_S, row, side="right"), len(ends_S) - 1)
    index = _starts(sizes_SR, 1)[sender, device] + row - _starts(sizes_SR, 0)[sender, device]
    return jnp.where((row < ends_S[-1])[:, None], all_SND[sender, jnp.minimum(index, x_ND.shape[0] - 1)], 0)
