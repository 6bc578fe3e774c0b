"""Functions of logits, applied to a few positions at a time, so that the logits of a whole sequence never coexist."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mythos_jax.sharding import platform

# Up to this vocabulary size the logits of all positions are small enough to keep. Above it, positions are processed in
# chunks of CHUNK_LENGTH per row.
MAX_UNCHUNKED_VOCAB = 8192
CHUNK_LENGTH = 256
# Where only some positions count, positions of all rows per chunk on a CPU. Accelerators need large products, and read
# and write the table's gradient once per chunk; a CPU computes small ones as fast, and leaves more of them out.
CPU_CHUNK = 256


def map_chunks(
    function: Callable[..., jax.Array],
    arrays: tuple[jax.Array, ...],
    vocab_size: int,
    chunk_length: int | None = None,
) -> jax.Array:
    """Applies `function`, which maps arrays [B, T, ...] to one array [B, T], to chunks of the positions.

    `function` must treat every position independently of the others. Each chunk is recomputed in the backward pass.
    chunk_length: positions per chunk (default: T for a small vocabulary, else CHUNK_LENGTH).
    """
    B, T = arrays[0].shape[:2]
    chunk_length = _chunk_length(T, vocab_size, chunk_length)
    n_chunks = -(-T // chunk_length)
    if n_chunks == 1:
        return function(*arrays)

    def split(x: jax.Array) -> jax.Array:
        """[n_chunks, B, chunk_length, ...]."""
        x = jnp.pad(x, ((0, 0), (0, n_chunks * chunk_length - T)) + ((0, 0),) * (x.ndim - 2))
        # Chunk i takes positions i, i + n_chunks, i + 2 n_chunks, …, so every chunk uses all devices along the
        # sequence, and rows and positions that are sharded over devices stay where they are.
        return jnp.moveaxis(x.reshape(B, chunk_length, n_chunks, *x.shape[2:]), 2, 0)

    results = jax.lax.map(jax.checkpoint(lambda chunk: function(*chunk)), tuple(map(split, arrays)))
    return jnp.moveaxis(results, 0, 2).reshape(B, n_chunks * chunk_length)[:, :T]


def map_counted_chunks(
    function: Callable[..., Any],
    arrays: tuple[jax.Array, ...],
    counts_BT: jax.Array,
    vocab_size: int,
    chunk_length: int | None = None,
) -> Any:
    """`map_chunks` of one device's arrays where only some positions count: bool [B, T]. The others get 0.

    The positions that count are moved to the front, over all rows, and chunks without any are not computed, neither in
    the forward nor in the backward pass. It is the same program for any number of them. Devices may compute different
    numbers of chunks, so collectives in `function` must be over devices that hold the same positions.
    """
    B, T = counts_BT.shape
    size = B * _chunk_length(T, vocab_size, chunk_length)
    if chunk_length is None and size < B * T and platform() == "cpu":
        size = min(size, CPU_CHUNK)
    n_chunks = -(-B * T // size)
    if n_chunks == 1:
        results = function(*arrays)
        return jax.tree.map(lambda x_BT: jnp.where(counts_BT, x_BT, 0), results)
    order_N = jnp.argsort(~counts_BT.reshape(-1), stable=True)
    place_N = jnp.argsort(order_N)

    def split(x: jax.Array) -> jax.Array:
        """[n_chunks, 1, size, ...], whose first positions count."""
        x = _permute(x.reshape(B * T, *x.shape[2:]), order_N, place_N)
        x = jnp.pad(x, ((0, n_chunks * size - B * T),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(n_chunks, 1, size, *x.shape[1:])

    chunks = tuple(map(split, arrays))
    like = jax.eval_shape(function, *(x[0] for x in chunks))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def compute(chunk: tuple[Any, ...]) -> Any:
        is_counted, *parts = chunk
        return jax.lax.cond(is_counted, function, lambda *_: zeros, *parts)

    is_counted = jnp.arange(n_chunks) * size < counts_BT.sum()
    results = jax.lax.map(jax.checkpoint(compute), (is_counted, *chunks))

    def join(x: jax.Array) -> jax.Array:
        x_BT = _permute(x.reshape(n_chunks * size)[: B * T], place_N, order_N).reshape(B, T)
        return jnp.where(counts_BT, x_BT, 0)

    return jax.tree.map(join, results)


def _chunk_length(length: int, vocab_size: int, chunk_length: int | None) -> int:
    return min(length, chunk_length or (length if vocab_size <= MAX_UNCHUNKED_VOCAB else CHUNK_LENGTH))


@jax.custom_vjp
def _permute(x: jax.Array, order_N: jax.Array, place_N: jax.Array) -> jax.Array:
    """x[order], where `place` is the inverse of the permutation: its gradient is a gather too, and no scatter."""
    return jnp.take(x, order_N, axis=0)


_permute.defvjp(
    lambda x, order_N, place_N: (jnp.take(x, order_N, axis=0), place_N),
    lambda place_N, ct: (jnp.take(ct, place_N, axis=0), None, None),
)
