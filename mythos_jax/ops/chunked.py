"""Functions of logits, applied to a few positions at a time, so that the logits of a whole sequence never coexist."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

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
COUNTED_SCOPE = "counted_chunks"  # names the loops over them in compiled programs

Results = TypeVar("Results")  # an array [B, T], or a tuple of them


def map_chunks(
    function: Callable[..., Results],
    arrays: tuple[jax.Array, ...],
    vocab_size: int,
    chunk_length: int | None = None,
) -> Results:
    """Applies `function`, which maps arrays [B, T, ...] to one array [B, T] or several, to chunks of the positions.

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

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2).reshape(B, n_chunks * chunk_length)[:, :T]

    joined: Results = jax.tree.map(join, results)
    return joined


def map_counted_chunks(
    function: Callable[..., Any],
    arrays: tuple[jax.Array, ...],
    counts_BT: jax.Array,
    vocab_size: int,
    chunk_length: int | None = None,
) -> Any:
    """`map_chunks` of one device's arrays where only some positions count: bool [B, T]. The others get 0.

    The positions that count are moved to the front, over all rows, and chunks without any are not computed, neither in
    the forward nor in the backward pass, which costs as much as there is to count. It is the same program for any
    number of them. Devices may compute different numbers of chunks, so collectives in `function` must be over devices
    that hold the same positions.
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
    # What the function closes over, a table above all, becomes arguments that gradients can flow to.
    converted, shared = jax.closure_convert(function, *(x[0] for x in chunks))
    results = _first_chunks(converted, -(-counts_BT.sum() // size), chunks, shared)

    def join(x: jax.Array) -> jax.Array:
        x_BT = _permute(x.reshape(n_chunks * size)[: B * T], place_N, order_N).reshape(B, T)
        return jnp.where(counts_BT, x_BT, 0)

    return jax.tree.map(join, results)


def count_chunks(length: int, vocab_size: int) -> int:
    """Into how many chunks an accelerator cuts rows of this length, if all positions count."""
    return -(-length // _chunk_length(length, vocab_size, None))


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _first_chunks(
    function: Callable[..., Any], n: jax.Array, chunks: tuple[jax.Array, ...], shared: list[jax.Array]
) -> Any:
    """`function(*chunk, *shared)` of the first n chunks, stacked; 0 for the others. A loop of traced length, which runs
    again in the backward pass."""

    def add(i: jax.Array, results: Any) -> Any:
        new = function(*(x[i] for x in chunks), *shared)
        return jax.tree.map(lambda all_chunks, x: all_chunks.at[i].set(x), results, new)

    like = jax.eval_shape(lambda *chunk: function(*chunk, *shared), *(x[0] for x in chunks))
    zeros = jax.tree.map(lambda x: jnp.zeros((len(chunks[0]), *x.shape), x.dtype), like)
    with jax.named_scope(COUNTED_SCOPE):
        return jax.lax.fori_loop(0, n, add, zeros)


_Residuals = tuple[jax.Array, tuple[jax.Array, ...], list[jax.Array]]


def _first_chunks_backward(function: Callable[..., Any], residuals: _Residuals, ct: Any) -> tuple[None, Any, Any]:
    n, chunks, shared = residuals
    moving = [jnp.issubdtype(x.dtype, jnp.inexact) for x in chunks]  # the others, targets above all, have no gradient

    def add(i: jax.Array, total: tuple[Any, Any]) -> tuple[Any, Any]:
        chunk = [x[i] for x in chunks]

        def of(floats: list[jax.Array], shared: list[jax.Array]) -> Any:
            rest = iter(floats)
            return function(*(next(rest) if moves else x for moves, x in zip(moving, chunk, strict=True)), *shared)

        floats = [x for moves, x in zip(moving, chunk, strict=True) if moves]
        of_chunk, of_shared = jax.vjp(of, floats, shared)[1](jax.tree.map(lambda x: x[i], ct))
        set_chunk = jax.tree.map(lambda all_chunks, x: all_chunks.at[i].set(x), total[0], of_chunk)
        return set_chunk, jax.tree.map(jnp.add, total[1], of_shared)

    zeros = [jnp.zeros_like(x) for moves, x in zip(moving, chunks, strict=True) if moves]
    with jax.named_scope(COUNTED_SCOPE):
        of_chunks, of_shared = jax.lax.fori_loop(0, n, add, (zeros, jax.tree.map(jnp.zeros_like, shared)))
    rest = iter(of_chunks)
    return None, tuple(next(rest) if moves else None for moves in moving), of_shared


_first_chunks.defvjp(
    lambda function, *arguments: (_first_chunks(function, *arguments), arguments), _first_chunks_backward
)
