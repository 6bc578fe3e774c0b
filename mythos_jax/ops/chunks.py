"""Work on logits in parts of the positions, so that all of them never exist at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Above this vocabulary the logits of a whole sequence are too large to keep; then so many positions at a time.
WHOLE_VOCAB = 8192
CHUNK = 256


def in_chunks(
    run: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], vocabulary: int, chunk: int | None = None
) -> jax.Array:
    """`run` of arrays [B, T, ...] to [B, T], `chunk` positions at a time (default: by the size of the vocabulary).

    Parts are computed again in the backward pass. Each position must be computed by itself.
    """
    B, T = arrays[0].shape[:2]
    chunk = min(T, chunk or (T if vocabulary <= WHOLE_VOCAB else CHUNK))
    n = -(-T // chunk)
    if n == 1:
        return run(*arrays)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, n * chunk - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, chunk, n, *x.shape[2:]), 2, 0)

    # Part i takes positions i, i + n, i + 2 n, …: rows and positions cut over devices stay where they are.
    parts = jax.lax.map(jax.checkpoint(lambda part: run(*part)), tuple(map(cut, arrays)))
    return jnp.moveaxis(parts, 0, 2).reshape(B, n * chunk)[:, :T]
