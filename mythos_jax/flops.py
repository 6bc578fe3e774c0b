"""Parameters, FLOPs and bytes of a model, computed from its config as functions of the number of loops.

XLA's own cost analysis counts the body of a loop once, so it does not show what depth costs. A multiply-add counts as
two FLOPs. FLOPs and bytes are those of matrices; norms, softmax and the like are left out.
"""

import math
from dataclasses import dataclass

import jax

from mythos_jax.config import Config, ModelConfig, backprop_loops, mean_loops
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.layers import compute_dtype


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters; a tied embedding, which is also the output head, counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_variables(config)["params"]))


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per token. loop: of a single loop. coda: including the linear map before it, if there is one."""

    prelude: int
    loop: int
    coda: int
    head: int

    def at(self, loops: int) -> int:
        """Forward FLOPs per token with this number of loops."""
        return self.prelude + loops * self.loop + self.coda + self.head


def forward_flops(config: ModelConfig, context: int) -> Flops:
    """Forward FLOPs per token, if each token attends to `context` keys.

    For a causal sequence of n tokens, the mean context is about n / 2.
    """
    c = config
    attention = 2 * _attention_weights(c) + 2 * context * _attention_per_key(c)
    dense = attention + 2 * _dense_weights(c, c.hidden_dim)
    loop = c.loop_layers * (attention + 2 * _loop_feed_forward_weights(c))
    # Diagonal maps are left out, and so is what an injection of the user's own costs.
    loop += 2 * {"parcae": c.dim**2, "concat": 2 * c.dim**2}.get(c.injection, 0)
    loop += 2 * 2 * c.dim * c.lora_rank + (2 * c.dim if c.readout == "act" else 0)
    return Flops(
        prelude=c.prelude_layers * dense,
        loop=loop,
        coda=c.coda_layers * dense + (2 * c.dim**2 if c.readout_projection else 0),
        head=2 * c.dim * c.vocab_size,
    )


def training_flops(config: Config, loops: float | None = None) -> int:
    """FLOPs of one optimizer step on the global batch, without recomputation. loops: its mean depth (default: that of
    the config).

    The backward pass costs twice the forward pass; loops without gradients cost the forward pass alone. What trains an
    exit gate runs coda and head after each loop with gradients; the gate's own gradients cost nothing. Attention is
    causal.
    """
    flops = forward_flops(config.model, max(config.data.seq_len // 2, 1))
    exit_loss = config.training.objectives.exit_loss
    mean = mean_loops(config) if loops is None else loops
    traced = min(mean, backprop_loops(config))
    read_outs = 1 if exit_loss == "none" else traced
    forward = flops.prelude + traced * flops.loop + read_outs * (flops.coda + flops.head)
    per_token = (1 if exit_loss == "gain" else 3) * forward + (mean - traced) * flops.loop
    return round(config.training.batch_size * config.data.seq_len * per_token)


def cache_bytes(config: ModelConfig, loops: int) -> int:
    """Bytes of the decoding cache per token of context, with one slot per loop.

    Each layer and slot keeps kv_lora_rank + qk_rope_head_dim channels with mla, 2 n_kv_heads head_dim with gqa.
    """
    c = config
    mla = c.attention == "mla"
    channels = c.kv_lora_rank + c.qk_rope_head_dim if mla else 2 * c.n_kv_heads * c.gqa_head_dim
    slots = c.prelude_layers + c.coda_layers + loops * c.loop_layers
    return slots * channels * compute_dtype(c).itemsize


def decode_bytes(config: ModelConfig, context: int, loops: int) -> int:
    """Bytes that must be read to decode one token of one row after `context` tokens: weights and cache.

    A weight counts each time it is used: the loop's weights once per loop, and only the routed experts that the token
    is sent to. Weights are assumed to be stored in the compute dtype; if they are float32, they take twice the bytes
    of bfloat16.
    """
    weights = forward_flops(config, context=0).at(loops) // 2  # for one token, each weight is one multiply-add
    return weights * compute_dtype(config).itemsize + context * cache_bytes(config, loops)


def _attention_weights(c: ModelConfig) -> int:
    """Weights of one attention layer."""
    if c.attention == "mla":
        nope, rope, V = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        query = c.dim * c.q_lora_rank + c.q_lora_rank * c.n_heads * (nope + rope)
        key_value = c.dim * (c.kv_lora_rank + rope) + c.kv_lora_rank * c.n_heads * (nope + V)
        return query + key_value + c.n_heads * V * c.dim
    return c.dim * c.gqa_head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)


def _attention_per_key(c: ModelConfig) -> int:
    """Multiply-adds per key, over all heads: its score, and its value's part of the weighted sum."""
    if c.attention == "mla":
        return c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return 2 * c.n_heads * c.gqa_head_dim


def _dense_weights(c: ModelConfig, hidden: int) -> int:
    """Weights of a dense feed-forward layer of this hidden width."""
    return (3 if c.activation == "swiglu" else 2) * c.dim * hidden


def _loop_feed_forward_weights(c: ModelConfig) -> int:
    """Weights of a feed-forward layer in the loop that one token uses."""
    if c.feed_forward == "dense":
        return _dense_weights(c, c.loop_hidden_dim or c.hidden_dim)
    routed = c.experts_per_token * c.expert_dim
    shared = c.n_shared_experts * (c.shared_expert_dim or c.expert_dim)
    return c.dim * c.n_experts + 3 * c.dim * (routed + shared)
