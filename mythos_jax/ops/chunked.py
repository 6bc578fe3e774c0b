"""Functions of logits, applied to a few positions at a time, so that the logits of a whole sequence never coexist."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Up to this vocabulary size the logits of all positions are small enough to keep. Above it, positions are processed in
# chunks of CHUNK_LENGTH per row.
MAX_UNCHUNKED_VOCAB = 8192
CHUNK_LENGTH = 256


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
    chunk_length = min(T, chunk_length or (T if vocab_size <= MAX_UNCHUNKED_VOCAB else CHUNK_LENGTH))
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
