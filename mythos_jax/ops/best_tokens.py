"""The likeliest next tokens, without ever holding all logits at once."""

import jax
import jax.numpy as jnp

from mythos_jax.ops.chunks import in_chunks
from mythos_jax.sharding import constrain


def best_tokens(features_BTD: jax.Array, table_VD: jax.Array, chunk: int | None = None) -> jax.Array:
    """The likeliest token of each position, int32 [B, T], under logits = features table^T.

    chunk: positions whose logits exist at a time (default: see `in_chunks`).
    """
    table_VD = constrain(table_VD.astype(features_BTD.dtype), "vocab", "act_embed")

    def best(features_BCD: jax.Array) -> jax.Array:
        logits_BCV = jnp.einsum("BCD,VD->BCV", features_BCD, table_VD, preferred_element_type=jnp.float32)
        logits_BCV = constrain(logits_BCV, "batch", "length", "act_vocab")
        return jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)

    return in_chunks(best, (features_BTD,), table_VD.shape[0], chunk)
