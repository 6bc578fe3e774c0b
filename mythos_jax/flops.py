"""Parameters, FLOPs and bytes, counted from the config alone, analytic in loops.

XLA's own cost analysis counts the body of a loop once, so it cannot tell what depth costs.
"""

import math
from dataclasses import dataclass

import jax

from mythos_jax.config import Config, ModelConfig, backprop_loops, mean_loops
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.layers import compute_dtype


def count_parameters(config: ModelConfig) -> int:
    """All of them; the tied embedding once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_variables(config)["params"]))


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token, a multiply-add counted as two; attention as if every key were seen."""

    prelude: int
    loop: int  # of one loop
    coda: int  # read-out map included
    head: int

    def at(self, loops: int) -> int:
        return self.prelude + loops * self.loop + self.coda + self.head


def forward_flops(config: ModelConfig, context: int) -> Flops:
    """FLOPs per token where each token attends to `context` keys (a causal sequence of n tokens: about n / 2)."""
    c = config
    attention = 2 * _attention_weights(c) + 2 * context * _attention_per_key(c)
    dense = attention + 2 * _dense_weights(c, c.hidden_dim)
    loop = c.loop_layers * (attention + 2 * _loop_feed_forward_weights(c))
    loop += 2 * {"openmythos": 0, "none": 0, "parcae": c.dim**2, "concat": 2 * c.dim**2}[c.injection]
    loop += 2 * 2 * c.dim * c.lora_rank + (2 * c.dim if c.readout == "act" else 0)
    return Flops(
        prelude=c.prelude_layers * dense,
        loop=loop,
        coda=c.coda_layers * dense + (2 * c.dim**2 if c.readout_projection else 0),
        head=2 * c.dim * c.vocab_size,
    )


def training_flops(config: Config) -> int:
    """FLOPs of one optimizer step on the global batch, without what is computed twice to save memory.

    The backward pass costs twice the forward; loops without gradient cost the forward alone. Attention is causal.
    """
    flops, mean = forward_flops(config.model, context=max(config.data.seq_len // 2, 1)), mean_loops(config)
    learning = min(mean, backprop_loops(config))
    per_token = 3 * flops.at(learning) + (mean - learning) * flops.loop
    return config.training.batch_size * config.data.seq_len * per_token


def cache_bytes(config: ModelConfig, loops: int) -> int:
    """Bytes of decode cache per token of context, one slot a loop: mla keeps (kv_rank + rope_dim) channels a slot,
    gqa 2 n_kv_heads head_dim."""
    c = config
    mla = c.attention == "mla"
    channels = c.kv_lora_rank + c.qk_rope_head_dim if mla else 2 * c.n_kv_heads * c.gqa_head_dim
    slots = c.prelude_layers + c.coda_layers + loops * c.loop_layers
    return slots * channels * compute_dtype(c).itemsize


def decode_bytes(config: ModelConfig, context: int, loops: int) -> int:
    """Bytes that must be read to decode one token of one row after `context` tokens: a weight each time it is used
    (the loop's once a loop, of the routed experts those chosen), in the compute dtype, and the cache.

    What a device computes with bfloat16 may be stored as float32 and then cost twice that; norms are left out.
    """
    weights = forward_flops(config, context=0).at(loops) // 2  # with one token, each is one multiply-add
    return weights * compute_dtype(config).itemsize + context * cache_bytes(config, loops)


def _attention_weights(c: ModelConfig) -> int:
    if c.attention == "mla":
        nope, rope, V = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        query = c.dim * c.q_lora_rank + c.q_lora_rank * c.n_heads * (nope + rope)
        key_value = c.dim * (c.kv_lora_rank + rope) + c.kv_lora_rank * c.n_heads * (nope + V)
        return query + key_value + c.n_heads * V * c.dim
    return c.dim * c.gqa_head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)


def _attention_per_key(c: ModelConfig) -> int:
    """Multiply-adds for one key: its score and its share of the sum, over all heads."""
    if c.attention == "mla":
        return c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return 2 * c.n_heads * c.gqa_head_dim


def _dense_weights(c: ModelConfig, hidden: int) -> int:
    return (3 if c.activation == "swiglu" else 2) * c.dim * hidden


def _loop_feed_forward_weights(c: ModelConfig) -> int:
    if c.feed_forward == "dense":
        return _dense_weights(c, c.loop_hidden_dim or c.hidden_dim)
    routed = c.experts_per_token * c.expert_dim
    shared = c.n_shared_experts * (c.shared_expert_dim or c.expert_dim)
    return c.dim * c.n_experts + 3 * c.dim * (routed + shared)
