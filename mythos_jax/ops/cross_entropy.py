"""Next-token cross-entropy that never holds all logits at once."""

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
    T, V = features_BTD.shape[1], table_VD.shape[0]
    chunk = min(T, chunk or (T if V <= WHOLE_VOCAB else CHUNK))

    def nats(features, targets):
        table = constrain(table_VD.astype(features.dtype), "vocab", "act_embed")
        logits = jnp.einsum("BTD,VD->BTV", features, table, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", "length", "act_vocab")
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    if chunk == T:
        return nats(features_BTD, targets_BT)
    pad = -T % chunk
    n = (T + pad) // chunk

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunk, n, *x.shape[2:]), 2, 0)

    # Part i takes positions i, i + n, i + 2 n, …: rows and positions cut over devices stay where they are.
    parts = jax.lax.map(jax.checkpoint(lambda part: nats(*part)), (cut(features_BTD), cut(targets_BT)))
    return jnp.moveaxis(parts, 0, 2).reshape(features_BTD.shape[0], n * chunk)[:, :T]
