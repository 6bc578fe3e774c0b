"""One transformer layer: norm placement, attention, feed-forward."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from mythos_jax.config import ModelConfig
from mythos_jax.model.attention import AttentionContext, GroupedQueryAttention, MultiHeadLatentAttention
from mythos_jax.model.cache import LayerCache
from mythos_jax.model.layers import FeedForward, RMSNorm
from mythos_jax.model.moe import MoE, RouterStats
from mythos_jax.model.remat import FEED_FORWARD, LAYER, remat_layer
from mythos_jax.sharding import constrain


class TransformerBlock(nn.Module):
    """Attention and feed-forward with residuals.

    Each is a sublayer f with one of these norms: pre: x + f(n(x)). sandwich: n'(x + f(n(x))), the outer norm on the sum
    (Huginn, arXiv 2502.05171). pre_post: x + n'(f(n(x))) (Ouro, arXiv 2510.25741). post: x + n'(f(x)) (OLMo-2, arXiv
    2501.00656).
    """

    config: ModelConfig
    layer: int  # index over prelude, loop and coda layers
    in_loop: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: AttentionContext,
        cache: LayerCache,
        counted_BT: jax.Array,
        value_BTGK: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache, RouterStats | None]:
        """counted_BT: bool, tokens that count in the router's statistics. value_BTGK: value embeddings, if any.

        Returns the residual stream [B, T, D], the layer's cache, and the router's statistics (None where dense)."""
        c = self.config
        stats = None

        def enter(x_BTD: jax.Array, name: str) -> jax.Array:
            return x_BTD if c.norm == "post" else RMSNorm(c.norm_eps, name=f"{name}_norm")(x_BTD)

        def leave(x_BTD: jax.Array, y_BTD: jax.Array, name: str) -> jax.Array:
            if c.norm == "pre":
                return x_BTD + y_BTD
            outer = RMSNorm(c.norm_eps, name=f"{name}_out_norm")
            return outer(x_BTD + y_BTD) if c.norm == "sandwich" else x_BTD + outer(y_BTD)

        # Attention.
        y = enter(x_BTD, "attention")
        if c.attention == "mla":
            y, cache = MultiHeadLatentAttention(c, name="attention")(y, context, cache)
        else:
            # A list in the config says which layers have one, so that no file's parity rules enter the model.
            gate = self.layer in c.value_gate_layers
            y, cache = GroupedQueryAttention(c, gate, name="attention")(y, context, cache, value_BTGK)
        x_BTD = leave(x_BTD, y, "attention")

        # Feed-forward: experts only in the loop, where their parameters are used many times.
        y = enter(x_BTD, "feed_forward")
        if self.in_loop and c.feed_forward == "moe":
            y, stats, sums = MoE(c, name="moe")(y, counted_BT, cache.expert_sums)
            cache = cache.replace(expert_sums=sums)
        else:
            # Prelude and coda are dense, and so is the loop of a dense model, possibly with a width of its own.
            hidden = (self.in_loop and c.loop_hidden_dim) or c.hidden_dim
            y = FeedForward(c, hidden, name="feed_forward")(y)
        y = checkpoint_name(y, FEED_FORWARD)
        x_BTD = leave(x_BTD, y, "feed_forward")
        return constrain(x_BTD, "batch", "length", "act_embed"), cache, stats


def apply_layers(
    blocks: Sequence[TransformerBlock],
    x_BTD: jax.Array,
    context: AttentionContext,
    caches: Sequence[LayerCache],
    counted_BT: jax.Array,
    values: Sequence[jax.Array | None],
) -> tuple[jax.Array, tuple[LayerCache, ...], list[RouterStats | None]]:
    """Runs layers in order; returns the stream, each layer's cache, and each router's statistics."""
    new_caches, stats = [], []
    for block, cache, value_BTGK in zip(blocks, caches, values, strict=True):
        # Decoding and initialising have no backward pass.
        remat = "none" if cache.kv is not None or block.is_initializing() else block.config.remat
        call = remat_layer(TransformerBlock.__call__, remat)
        x_BTD, cache, layer_stats = call(block, x_BTD, context, cache, counted_BT, value_BTGK)
        x_BTD = checkpoint_name(x_BTD, LAYER)
        new_caches.append(cache)
        stats.append(layer_stats)
    return x_BTD, tuple(new_caches), stats
