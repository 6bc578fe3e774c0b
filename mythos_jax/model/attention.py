"""The two attentions: grouped-query (GQA) and multi-head latent (MLA)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.cache import KV, LayerCache, update_cache
from mythos_jax.model.gather import adaptable_weight
from mythos_jax.model.layers import Linear, RMSNorm, apply_rope, matrix_init, rms_norm, rope_tables
from mythos_jax.model.state import TokenInputs
from mythos_jax.ops.attention import Mask, attend
from mythos_jax.ops.products import linear_per_head, linear_to_heads, some_outputs
from mythos_jax.sharding import constrain

# Parcae's QK norm uses float32's machine epsilon, not the model's norm_eps.
QK_NORM_EPS = 1.1920929e-07
# Parcae's value gate reads this many channels of the normalised stream.
VALUE_GATE_CHANNELS = 32


class AttentionContext(struct.PyTreeNode):
    """What the attention layers of one call share.

    rope: cosines and sines, [B or 1, T, rope_dim]. mask: which keys a query may attend to, and with a cache where
    the tokens are in it. loop: t, int32 [] or one per row [B]; 0 outside the loop. frozen_BT: bool, tokens whose loops
    have ended (None: no token can be frozen). first_only: loops attend to the keys and values of the first.
    """

    rope: tuple[jax.Array, jax.Array]
    mask: Mask
    loop: jax.Array | int = 0
    frozen_BT: jax.Array | None = None
    first_only: bool = struct.field(pytree_node=False, default=False)

    def update(self, cache: LayerCache, new: KV) -> tuple[LayerCache, KV]:
        """`update_cache` for the current loop."""
        where = {"index_BT": self.mask.index_BT, "frozen_BT": self.frozen_BT}
        return update_cache(cache, new, loop=self.loop, first_only=self.first_only, **where)


def make_attention_context(config: ModelConfig, inputs: TokenInputs) -> AttentionContext:
    """Positions and masks of these tokens, outside the loop."""
    index_BT, positions_BT = inputs.index_BT, inputs.positions_BT
    if positions_BT is None:
        T = inputs.tokens_BT.shape[1]
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None] if index_BT is None else index_BT
    # In a cache a query sees everything up to its own place; segments exist without one only.
    mask = Mask(segments_BT=inputs.segments_BT) if index_BT is None else Mask(index_BT=index_BT)
    return AttentionContext(rope_tables(positions_BT, config), mask, first_only=config.loop_kv == "first")


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with RoPE; optional biases, norms on queries and keys, and gated value
    embeddings."""

    config: ModelConfig
    value_gate: bool = False  # this layer has a gate for value embeddings

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: AttentionContext, cache: LayerCache, value_BTGK: jax.Array | None = None
    ) -> tuple[jax.Array, LayerCache]:
        c = self.config
        H, G, K = c.n_heads, c.n_kv_heads, c.gqa_head_dim

        def project(heads: int, kind: str, name: str) -> jax.Array:
            return Linear((heads, K), ("embed", kind, "head_dim"), c.std, products=c.products, name=name)(x_BTD)

        q_BTHK, k_BTGK, v_BTGK = project(H, "heads", "q"), project(G, "kv_heads", "k"), project(G, "kv_heads", "v")
        if c.qk_bias:
            q_BTHK += self._bias("q_bias", "heads", H).astype(x_BTD.dtype)
            k_BTGK += self._bias("k_bias", "kv_heads", G).astype(x_BTD.dtype)
        if c.value_bias:
            v_BTGK += self._bias("v_bias", "kv_heads", G).astype(x_BTD.dtype)
        if c.qk_gain_norm != "none":
            axes = 1 if c.qk_gain_norm == "head" else 2
            q_BTHK = RMSNorm(c.norm_eps, axes, name="q_norm")(q_BTHK)
            k_BTGK = RMSNorm(c.norm_eps, axes, name="k_norm")(k_BTGK)
        # Rotated before they are cached, so that decoding rotates only the new key.
        q_BTHK, k_BTGK = apply_rope(q_BTHK, context.rope), apply_rope(k_BTGK, context.rope)
        if c.qk_norm:  # after RoPE, as in Parcae; a rotation does not change the norm
            q_BTHK, k_BTGK = (rms_norm(x, QK_NORM_EPS).astype(x_BTD.dtype) for x in (q_BTHK, k_BTGK))
        if self.value_gate:
            gate = self.param("value_gate", matrix_init(c.std, None, "kv_heads"), (VALUE_GATE_CHANNELS, G), jnp.float32)
            if value_BTGK is not None:  # a gate without a table has a weight and no effect
                opening_BTG = 2 * nn.sigmoid(x_BTD[..., :VALUE_GATE_CHANNELS] @ gate.astype(x_BTD.dtype))
                v_BTGK += opening_BTG[..., None] * value_BTGK
        cache, (k_BSGK, v_BSGK) = context.update(cache, KV(k_BTGK, v_BTGK))
        assert v_BSGK is not None
        # Each key-value head serves its group of query heads: `attend` needs no repeated keys.
        out_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, context.mask, K**-0.5)
        out = Linear((c.dim,), ("heads", "head_dim", "embed"), c.output_std, 2, c.products, name="out")
        return out(out_BTHK), cache

    def _bias(self, name: str, kind: str, heads: int) -> jax.Array:
        init: Any = nn.with_logical_partitioning(nn.initializers.zeros, (kind, "head_dim"))
        return self.param(name, init, (heads, self.config.gqa_head_dim), jnp.float32)


class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Keys and values are made from one latent per token (after its norm) and one RoPE key shared by all heads; only
    these two are cached. Two forms give the same result: the expanded form builds every head's keys and values; the
    absorbed form moves the up-projection to the query and the output and attends to the latents themselves.
    """

    config: ModelConfig
    absorb: bool | None = None  # None: with a cache, whichever costs fewer FLOPs at these lengths; else expanded

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: AttentionContext, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        c = self.config
        H, R, nope, rope, V = c.n_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim

        # Queries: down to a latent, up to heads; only the rope channels are rotated.
        q_latent = Linear((c.q_lora_rank,), ("embed", "latent"), c.std, products=c.products, name="q_down")(x_BTD)
        q_latent = RMSNorm(c.norm_eps, name="q_norm")(q_latent)
        q_up = Linear((H, nope + rope), ("latent", "heads", "head_dim"), c.std, products=c.products, name="q_up")
        q_BTHK = constrain(q_up(q_latent), "batch", "length", "heads", "head_dim")
        q_nope, q_rope = q_BTHK[..., :nope], apply_rope(q_BTHK[..., nope:], context.rope)

        # Keys and values: one product gives the latent and the shared RoPE key, before its rotation.
        down = Linear((R + rope,), ("embed", "latent"), c.std, products=c.products, name="kv_down")(x_BTD)
        latent_BTR = RMSNorm(c.norm_eps, name="kv_norm")(down[..., :R])
        k_rope = apply_rope(down[..., None, R:], context.rope)[:, :, 0]
        cache, (seen, _) = context.update(cache, KV(jnp.concatenate([latent_BTR, k_rope], axis=-1), None))
        # Queries cut by `sequence` attend to all latents: the latents travel, not the wider keys and values made from
        # them. A single query is not cut, so a cache stays where it is.
        positions = "keys" if cache.kv is None or x_BTD.shape[1] > 1 else "cache_length"
        seen = constrain(seen, "batch", positions, "latent")

        shape, axes = (R, H, nope + V), ("latent", "heads", "head_dim")
        kv_up = adaptable_weight(self, "kv_up", shape, axes, c.std, x_BTD.dtype, inputs=1)
        k_up_RHK, v_up_RHV = some_outputs(kv_up, slice(nope)), some_outputs(kv_up, slice(nope, None))
        scale = (nope + rope) ** -0.5
        absorb = self.absorb
        if absorb is None:
            # Without a cache there are as many keys as queries: absorbing saves no projection, and its products over
            # the width of the latent are wider than kernels are made for.
            absorb = cache.kv is not None and self._absorbed_is_cheaper(x_BTD.shape[1], seen.shape[1])
        if absorb:
            # q (U c) = (q U) c: the query moves into the space of the latents, and the weighted sum moves out of it.
            query = jnp.concatenate([linear_per_head(q_nope, k_up_RHK, "OHI"), q_rope], axis=-1)
            out_BTHR = attend(query, seen[:, :, None], seen[:, :, None, :R], context.mask, scale)
            out_BTHV = linear_per_head(out_BTHR, v_up_RHV, "IHO")
        else:
            # All heads share the RoPE part of the key; the rest is made from the latent.
            latent_BSR, k_rope = seen[..., :R], seen[..., R:]
            k_nope = linear_to_heads(latent_BSR, k_up_RHK, c.products)
            k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:-1], rope))
            v_BSHV = linear_to_heads(latent_BSR, v_up_RHV, c.products)
            query, key = jnp.concatenate([q_nope, q_rope], axis=-1), jnp.concatenate([k_nope, k_rope], axis=-1)
            key, v_BSHV = (constrain(x, "batch", positions, "heads", "head_dim") for x in (key, v_BSHV))
            out_BTHV = attend(query, key, v_BSHV, context.mask, scale)
        out = Linear((c.dim,), ("heads", "head_dim", "embed"), c.output_std, 2, c.products, name="out")
        return out(out_BTHV), cache

    def _absorbed_is_cheaper(self, T: int, S: int) -> bool:
        """Compares multiply-adds per head: projections of T queries and S keys, then T x S scores and sums."""
        c = self.config
        R, nope, rope, V = c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        absorbed = T * R * (nope + V) + T * S * (R + rope + R)
        expanded = S * R * (nope + V) + T * S * (nope + rope + V)
        return absorbed < expanded
