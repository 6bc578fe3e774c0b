"""Next-token cross-entropy, and the likeliest next tokens, without ever holding all logits at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mythos_jax.sharding import constrain

# Above this vocabulary the logits of a whole sequence are too large to keep.
WHOLE_VOCAB = 8192
CHUNK = 256


def cross_entropy(
    features_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int | None = None
) -> jax.Array:
    """Float32 nats of each target, [B, T], under logits = features table^T.

    chunk: positions whose logits exist at a time (default: all for a small vocabulary, else 256); the backward pass
    computes them again. The table's gradient is summed in its own dtype, float32.
    """

    def nats(features, targets):
        logits = _logits(features, table_VD)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    return _in_parts(nats, (features_BTD, targets_BT), table_VD.shape[0], chunk)


def best_tokens(features_BTD: jax.Array, table_VD: jax.Array, chunk: int | None = None) -> jax.Array:
    """The likeliest token of each position, int32 [B, T]; arguments as in `cross_entropy`."""

    def best(features):
        return jnp.argmax(_logits(features, table_VD), axis=-1).astype(jnp.int32)

    return _in_parts(best, (features_BTD,), table_VD.shape[0], chunk)


def _logits(features_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
    table_VD = constrain(table_VD.astype(features_BTD.dtype), "vocab", "act_embed")
    logits_BTV = jnp.einsum("BTD,VD->BTV", features_BTD, table_VD, preferred_element_type=jnp.float32)
    return constrain(logits_BTV, "batch", "length", "act_vocab")


def _in_parts(
    run: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], vocabulary: int, chunk: int | None
) -> jax.Array:
    """`run` of arrays [B, T, …] to [B, T], on `chunk` positions at a time."""
    B, T = arrays[0].shape[:2]
    chunk = min(T, chunk or (T if vocabulary <= WHOLE_VOCAB else CHUNK))
    if chunk == T:
        return run(*arrays)
    pad = -T % chunk
    n = (T + pad) // chunk

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, chunk, n, *x.shape[2:]), 2, 0)

    # Part i takes positions i, i + n, i + 2 n, …: rows and positions cut over devices stay where they are.
    parts = jax.lax.map(jax.checkpoint(lambda part: run(*part)), tuple(map(cut, arrays)))
    return jnp.moveaxis(parts, 0, 2).reshape(B, n * chunk)[:, :T]
