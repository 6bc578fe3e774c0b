"""The likeliest next tokens, without ever holding all logits at once."""

import jax
import jax.numpy as jnp

from mythos_jax.ops.cross_entropy import CHUNK, WHOLE_VOCAB
from mythos_jax.sharding import constrain


def best_tokens(features_BTD: jax.Array, table_VD: jax.Array, chunk: int | None = None) -> jax.Array:
    """The likeliest token of each position, int32 [B, T], under logits = features table^T.

    chunk: positions whose logits exist at a time (default: all for a small vocabulary, else 256).
    """
    B, T, D = features_BTD.shape
    chunk = min(T, chunk or (T if table_VD.shape[0] <= WHOLE_VOCAB else CHUNK))
    table_VD = constrain(table_VD.astype(features_BTD.dtype), "vocab", "act_embed")

    def best(features_BCD: jax.Array) -> jax.Array:
        logits_BCV = jnp.einsum("BCD,VD->BCV", features_BCD, table_VD, preferred_element_type=jnp.float32)
        logits_BCV = constrain(logits_BCV, "batch", "length", "act_vocab")
        return jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)

    n = -(-T // chunk)
    if n == 1:
        return best(features_BTD)
    padded = jnp.pad(features_BTD, ((0, 0), (0, n * chunk - T), (0, 0)))
    # Part i takes positions i, i + n, i + 2 n, …: rows and positions cut over devices stay where they are.
    parts = jax.lax.map(best, jnp.moveaxis(padded.reshape(B, chunk, n, D), 2, 0))
    return jnp.moveaxis(parts, 0, 2).reshape(B, n * chunk)[:, :T]
