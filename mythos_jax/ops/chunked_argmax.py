"""The most likely next token of every position, without holding the logits of all positions at once."""

import jax
import jax.numpy as jnp

from mythos_jax.ops.chunked import map_chunks
from mythos_jax.sharding import constrain


def chunked_argmax(features_BTD: jax.Array, table_VD: jax.Array, chunk_length: int | None = None) -> jax.Array:
    """The argmax over the vocabulary of logits = features table^T, int32 [B, T].

    chunk_length: positions per row whose logits exist at a time (default: see `map_chunks`).
    """
    table_VD = constrain(table_VD.astype(features_BTD.dtype), "vocab", "act_embed")

    def argmax(features_BCD: jax.Array) -> jax.Array:
        logits_BCV = jnp.einsum("BCD,VD->BCV", features_BCD, table_VD, preferred_element_type=jnp.float32)
        logits_BCV = constrain(logits_BCV, "batch", "length", "act_vocab")
        return jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)

    return map_chunks(argmax, (features_BTD,), table_VD.shape[0], chunk_length)
