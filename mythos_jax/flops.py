"""Parameters, FLOPs and bytes of a model, computed from its config as functions of the number of loops.

XLA's own cost analysis counts the body of a loop once, so it does not show what depth costs. A multiply-add counts as
two FLOPs. FLOPs and bytes are those of matrices; norms, softmax and the like are left out.
"""

import math
from dataclasses import dataclass
from functools import cache

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from mythos_jax.config import Config, ModelConfig, backprop_loops, mean_loops
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.cache import model_slots
from mythos_jax.model.layers import compute_dtype
from mythos_jax.model.low_rank import adaptable, target_paths
from mythos_jax.model.names import frozen_paths, parameter_paths


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

    For a causal sequence of n tokens, the mean context is about n / 2. With `loop_kv: first`, keys and values of later
    loops are computed and not used; they count.
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


def training_flops(config: Config, loops: float | None = None, teacher: ModelConfig | None = None) -> int:
    """FLOPs of one optimizer step on the global batch, without recomputation. loops: its mean depth (default: that of
    the config).

    The backward pass of what trains costs twice the forward pass: a gradient of activations and one of weights. Frozen
    matrices have no gradient of weights, also beside low-rank weights, and below the first part that trains there is no
    backward pass; loops without gradients cost the forward pass alone. What trains an exit gate runs coda and head
    after each loop. Attention is causal. teacher: a model that the run learns from, of which each token costs a
    forward pass.
    """
    mean = mean_loops(config) if loops is None else loops
    traced = min(mean, backprop_loops(config))
    read_outs = 1 if config.training.objectives.exit_loss == "none" else traced
    context = max(config.data.seq_len // 2, 1)
    parts = trained_parts(config, context)
    per_token = (mean - traced) * (forward_flops(config.model, context).loop + _of_low_rank(config, "recurrence."))
    per_token += parts.prelude + traced * parts.loop + read_outs * (parts.coda + parts.head)
    if teacher is not None:
        per_token += forward_flops(teacher, context).at(teacher.loops)
    return round(config.training.batch_size * config.data.seq_len * per_token)


@cache
def trained_parts(config: Config, context: int) -> Flops:
    """FLOPs per token of the forward and backward pass of each part."""
    c, low_rank = config.model, low_rank_sizes(config)
    frozen = frozenset(parameter_paths(c)) if low_rank else frozen_paths(config)
    forward, weights = forward_flops(c, context), forward_flops(c, context=0)
    kept = {path: flops for path, flops in matrix_flops(c).items() if path in frozen}
    trained = [*low_rank] or [path for path in parameter_paths(c) if path not in frozen]

    def trains(*starts: str) -> bool:
        return any(path.startswith(starts) for path in trained)

    def cost(forward: int, weights: int, start: str, gradient_arrives: bool) -> int:
        """Of a part or a layer: attention between tokens has no weights, but gradients of two factors."""
        of_activations = 2 * forward - weights if gradient_arrives else 0
        of_weights = weights - sum(flops for path, flops in kept.items() if path.startswith(start))
        return forward + of_activations + of_weights + 3 * _of_low_rank(config, start)

    # From the bottom to the top: gradients arrive wherever something below trains. A gate reads the state, and what it
    # decides enters the read-out of ACT alone.
    arrives, prelude = trains("embedding", "value_table"), 0
    for i in range(n := c.prelude_layers):
        arrives |= trains(f"prelude_{i}.")
        prelude += cost(forward.prelude // n, weights.prelude // n, f"prelude_{i}.", arrives)
    cell = "recurrence.cell."
    arrives |= trains("prelude_norm", cell + "injection", cell + "layer_", cell + "lora", cell + "state_norm")
    loop = cost(forward.loop, weights.loop, cell, arrives)
    arrives |= trains("readout_projection") or (c.readout == "act" and trains(cell + "halt_"))
    projection = 2 * c.dim**2 if c.readout_projection else 0
    coda = cost(projection, projection, "readout_projection", arrives)
    for i in range(n := c.coda_layers):
        arrives |= trains(f"coda_{i}.")
        coda += cost((forward.coda - projection) // n, (weights.coda - projection) // n, f"coda_{i}.", arrives)
    arrives |= trains("final_norm")
    table = "embedding" if c.tied_embedding else "unembedding"
    head = forward.head * (1 + arrives + (table not in frozen))
    return Flops(prelude, loop, coda, head)


def _of_low_rank(config: Config, start: str) -> int:
    """Forward FLOPs per token of the low-rank weights below a path."""
    return 2 * sum(size for path, size in low_rank_sizes(config).items() if path.startswith(start))


@cache
def low_rank_sizes(config: Config) -> dict[str, int]:
    """The number of low-rank weights that a run trains, by the path of the matrix that they are beside."""
    lora, matrices, sizes = config.training.lora, adaptable(config.model), {}
    for path in target_paths(config.model, lora) if lora.rank else ():
        inputs, shape = len(matrices[path].inputs), matrices[path].value.shape
        sizes[path] = lora.rank * (math.prod(shape[:inputs]) + math.prod(shape[inputs:]))
    return sizes


def matrix_flops(config: ModelConfig) -> dict[str, int]:
    """Forward FLOPs per token of one use of each matrix, by its dotted path; tables are looked up for nothing."""
    flops = {}
    for path, leaf in flatten_dict(nn.unbox(abstract_variables(config)["params"]), sep=".").items():
        parent, name = ["", *path.split(".")][-2:]
        if len(leaf.shape) < 2 or not (name == "kernel" or parent in ("moe", "injection") or name == "kv_up"):
            continue
        used = config.experts_per_token / config.n_experts if parent == "moe" else 1
        flops[path] = round(2 * math.prod(leaf.shape) * used)
    return flops


def cache_bytes(config: ModelConfig, loops: int, loop_cache: str = "all") -> int:
    """Bytes of the decoding cache per token of context, for calls of up to `loops` loops that share its slots by this
    rule (`model.cache.model_slots`).

    Each layer and slot keeps kv_lora_rank + qk_rope_head_dim channels with mla, 2 n_kv_heads head_dim with gqa.
    """
    c = config
    mla = c.attention == "mla"
    channels = c.kv_lora_rank + c.qk_rope_head_dim if mla else 2 * c.n_kv_heads * c.gqa_head_dim
    slots = c.prelude_layers + c.coda_layers + min(model_slots(c, loop_cache, loops), loops) * c.loop_layers
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
