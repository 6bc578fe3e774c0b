"""Tiny models for the tests, their weights and inputs, and the compiled calls that the tests share."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import Output

B, T, V = 2, 8, 40

MLA_FIELDS: dict[str, Any] = {
    "attention": "mla",
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}


def moe_fields(n_experts: int, n_shared_experts: int = 0) -> dict[str, Any]:
    return {
        "feed_forward": "moe",
        "n_experts": n_experts,
        "experts_per_token": 2,
        "expert_dim": 16,
        "n_shared_experts": n_shared_experts,
    }


# One model per family, and variants. Compared with `reference`.
GQA = ModelConfig(  # OpenMythos
    vocab_size=V,
    dim=32,
    max_seq_len=16,
    loops=3,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=40,
    **moe_fields(5, n_shared_experts=1),
    loop_embedding=True,
    lora_rank=4,
    readout="act",
)
MLA = ModelConfig(
    vocab_size=V, dim=32, max_seq_len=16, loops=3, n_heads=4, hidden_dim=40, **MLA_FIELDS, state_norm=True
)
GQA_LAST = replace(GQA, readout="last", state_norm=True, feed_forward="dense")
MLA_ACT = replace(MLA, readout="act", state_norm=False, act_remainder=False)
HUGINN = ModelConfig(
    vocab_size=V,
    dim=32,
    max_seq_len=16,
    loops=3,
    loop_layers=2,
    n_heads=4,
    n_kv_heads=4,
    hidden_dim=40,
    qk_bias=True,
    norm="sandwich",
    injection="concat",
    initial_state="noise",
    readout_norm=True,
    embedding_scale=2.0,
)
PARCAE = ModelConfig(
    vocab_size=V,
    dim=32,
    max_seq_len=16,
    loops=3,
    n_heads=2,
    n_kv_heads=2,
    hidden_dim=40,
    loop_hidden_dim=24,
    activation="relu2",
    qk_norm=True,
    prelude_norm=True,
    injection="parcae",
    initial_state="noise",
    readout_projection=True,
    value_gate_layers=(0, 1),
    value_table_layers=(1, 2),
)

OURO = ModelConfig(
    vocab_size=V,
    dim=32,
    max_seq_len=16,
    prelude_layers=0,
    loop_layers=2,
    coda_layers=0,
    loops=3,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=40,
    norm="pre_post",
    qk_bias=True,  # as are the next three, of Qwen2, Qwen3 and Llama 3
    value_bias=True,
    qk_gain_norm="head",
    rope_scaling="llama3",
    rope_original_max_seq_len=16,
    injection="none",
    state_norm=True,
    final_norm=False,
    tied_embedding=False,
    exit_gate=True,
)
RAVEN = ModelConfig(  # cut from OLMo-2
    vocab_size=V,
    dim=32,
    max_seq_len=16,
    loops=3,
    n_heads=4,
    n_kv_heads=4,
    hidden_dim=40,
    norm="post",
    qk_gain_norm="width",
    injection="concat",
    initial_state="noise",
    initial_noise_std=0.02,
    tied_embedding=False,
)


# Dense, as the fields of a YAML file. For tests that train a model or evaluate one.
DENSE_FIELDS: dict[str, Any] = {
    "dim": 32,
    "max_seq_len": 32,
    "loops": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "hidden_dim": 48,
}
DENSE = ModelConfig(vocab_size=V, **{**DENSE_FIELDS, "max_seq_len": 16, "loops": 3})
TRAINED = ModelConfig(
    vocab_size=264, **DENSE_FIELDS, coda_layers=0, **moe_fields(4), prelude_norm=True, state_norm=True
)  # of bytes

# Every dimension that a mesh may divide is a multiple of 8. One layer each in the prelude and in the loop.
SHARDED_GQA = ModelConfig(
    vocab_size=64,
    dim=32,
    max_seq_len=16,
    coda_layers=0,
    loops=2,
    n_heads=8,
    n_kv_heads=8,
    hidden_dim=64,
    lora_rank=4,
    remat="full",
)
SHARDED_MLA = replace(SHARDED_GQA, **MLA_FIELDS)


@cache
def variables(config: ModelConfig, seed: int = 0) -> Any:
    """Weights far from their initial values, so that every part affects the output; float32 NumPy arrays, unboxed."""
    shapes = jax.eval_shape(Mythos(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    random = np.random.default_rng(seed)

    def weight(path, leaf):
        name, shape = path[-1].key, leaf.shape
        noise = random.standard_normal(shape)
        if name == "scale" and (len(shape) == 1 or path[-2].key in ("q_norm", "k_norm")):
            value = 1 + 0.2 * noise
        elif name in ("log_a", "log_dt", "dt_bias", "q_bias", "k_bias", "v_bias", "bias"):
            value = 0.5 * noise
        elif name == "halt_bias":
            value = np.full(shape, -1.0)
        elif name == "halt_kernel":
            value = (0.4 if config.exit_gate else 0.1) * noise
        elif name in ("embedding", "unembedding"):
            value = 0.5 * noise
        elif name == "scale" or name.startswith("value_table"):
            value = noise
        else:
            inputs = np.prod(shape[1:-1] if len(shape) == 3 and name in ("gate", "up", "down") else shape[:-1])
            value = noise / np.sqrt(max(inputs, 1))
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(weight, nn.unbox(shapes))


def exact(tree: Any) -> Any:
    """The same values in float64, for the reference."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def some_tokens(seed: int = 0, shape: tuple[int, ...] = (B, T)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def some_state(config: ModelConfig, seed: int = 0) -> np.ndarray | None:
    """An initial state for families that start from noise."""
    if config.initial_state != "noise":
        return None
    return np.random.default_rng(seed).standard_normal((B, T, config.dim)).astype(np.float32)


traces: Counter[ModelConfig] = Counter()  # how many times `run_traced` was traced


@partial(jax.jit, static_argnames=("config", "loops"))
def run(config: ModelConfig, variables: Any, tokens_BT: jax.Array, *, loops: int, **keywords: Any) -> Output:
    output: Any = Mythos(config).apply(variables, tokens_BT, loops=loops, **keywords)
    return output


@partial(jax.jit, static_argnames="config")
def run_traced(config: ModelConfig, variables: Any, tokens_BT: jax.Array, loops: jax.Array, **keywords: Any) -> Output:
    traces[config] += 1
    output: Any = Mythos(config).apply(variables, tokens_BT, loops=loops, **keywords)
    return output


def halting(criterion: str, threshold: float, min_loops: int = 1, max_loops: int = 100) -> Halting:
    """A policy with every field set, so that all policies of a criterion have the same pytree structure."""
    return Halting(criterion, threshold, min_loops, max_loops)
