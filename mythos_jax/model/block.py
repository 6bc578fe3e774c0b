"""One transformer layer: where the norms stand, which attention, which feed-forward."""

import flax.linen as nn
import jax

from mythos_jax.config import ModelConfig
from mythos_jax.model.attention import GroupedQueryAttention, MultiHeadLatentAttention, View
from mythos_jax.model.cache import Memory
from mythos_jax.model.layers import FeedForward, RMSNorm
from mythos_jax.model.moe import MoE, RouterStats
from mythos_jax.sharding import constrain


class TransformerBlock(nn.Module):
    """Attention and feed-forward with residuals.

    pre: x + f(norm(x)). sandwich: norm(x + f(norm(x))), the outer norm on the sum (Huginn, arXiv 2502.05171).
    """

    config: ModelConfig
    layer: int  # index over prelude, loop and coda layers
    in_loop: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        view: View,
        memory: Memory,
        counted_BT: jax.Array,
        value_BTGK: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory, RouterStats | None]:
        """Returns the stream, the layer's memory, and the router's statistics (None where dense)."""
        c = self.config
        stats = None

        def norm(x, name):
            return RMSNorm(c.norm_eps, name=name)(x)

        y = norm(x_BTD, "attention_norm")
        if c.attention == "mla":
            y, memory = MultiHeadLatentAttention(c, name="attention")(y, view, memory)
        else:
            gate = self.layer in c.value_gate_layers
            y, memory = GroupedQueryAttention(c, gate, name="attention")(y, view, memory, value_BTGK)
        x_BTD = x_BTD + y
        if c.norm == "sandwich":
            x_BTD = norm(x_BTD, "attention_out_norm")

        y = norm(x_BTD, "feed_forward_norm")
        if self.in_loop and c.feed_forward == "moe":
            y, stats = MoE(c, name="moe")(y, counted_BT)
        else:
            hidden = (self.in_loop and c.loop_hidden_dim) or c.hidden_dim
            y = FeedForward(c, hidden, name="feed_forward")(y)
        x_BTD = x_BTD + y
        if c.norm == "sandwich":
            x_BTD = norm(x_BTD, "feed_forward_out_norm")
        return constrain(x_BTD, "batch", "length", "act_embed"), memory, stats
