"""Counts compared with the arrays themselves and with XLA."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mythos_jax.config import ModelConfig
from mythos_jax.flops import cache_bytes, count_parameters, decode_bytes, forward_flops
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.cache import init_cache
from mythos_jax.model.mythos import Mythos

GQA = ModelConfig(vocab_size=64, dim=64, n_heads=4, n_kv_heads=2, hidden_dim=96, max_seq_len=64, prelude_layers=2)
MLA = ModelConfig(
    vocab_size=64, dim=64, n_heads=4, hidden_dim=96, max_seq_len=64, attention="mla", q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12, lora_rank=4, injection="concat",
)  # fmt: skip
MOE = dataclasses.replace(GQA, feed_forward="moe", n_experts=8, experts_per_token=2, expert_dim=32, n_shared_experts=1)


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_parameters_equal_those_of_an_initialised_model(config):
    params = jax.jit(Mythos(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert count_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_flops_are_close_to_what_xla_counts(config):
    """With one loop, which XLA counts completely. XLA also counts norms, softmax and so on: a few percent here."""
    T = 64
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    variables = jax.eval_shape(Mythos(config).init, jax.random.key(0), tokens)
    compiled = jax.jit(lambda v, t: Mythos(config).apply(v, t, loops=1).logits).lower(variables, tokens).compile()
    counted = compiled.cost_analysis()["flops"]
    assert forward_flops(config, context=T).at(1) * T == pytest.approx(counted, rel=0.12)


def test_flops_are_linear_in_loops():
    flops = forward_flops(GQA, 32)
    assert flops.at(9) - flops.at(5) == 4 * flops.loop


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_cache_bytes_equal_those_of_the_cache(config):
    cache = init_cache(config, batch=3, capacity=16, loops=5)
    cached = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.prelude, cache.loop, cache.coda)))
    assert cached == 3 * 16 * cache_bytes(config, loops=5)
    if config.attention == "mla":
        assert cache_bytes(config, 5) == 4 * (16 + 8) * (1 + 1 + 5)


@pytest.mark.parametrize(
    "config", [GQA, MLA, MOE, dataclasses.replace(MOE, dtype="bfloat16", injection="parcae")],
    ids=["gqa", "mla", "moe", "bfloat16"],
)  # fmt: skip
def test_bytes_of_a_decoded_token_equal_those_of_its_matrices_and_cache(config):
    """The loop's matrices count once per loop; of the routed experts, the fraction that a token is sent to counts."""
    loops, context, read = 5, 16, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(abstract_variables(config)["params"])):
        names = [entry.key for entry in path]
        if leaf.ndim < 2 or names[-1] == "scale":  # norms, diagonals, and one row of the LoRA's table
            continue
        routed = names[-2:-1] == ["moe"]
        used = config.experts_per_token / config.n_experts if routed else 1
        read += leaf.size * used * (loops if names[0] == "recurrence" else 1)
    itemsize = 2 if config.dtype == "bfloat16" else 4
    cache = init_cache(config, batch=1, capacity=context, loops=loops)
    cached = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.prelude, cache.loop, cache.coda)))
    assert decode_bytes(config, context, loops) == read * itemsize + cached
