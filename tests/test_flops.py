"""Counts compared with the arrays themselves and with XLA."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mythos_jax.config import Config, DataConfig, DepthConfig, ModelConfig, ObjectivesConfig, TrainingConfig
from mythos_jax.flops import (
    cache_bytes,
    count_parameters,
    decode_bytes,
    forward_flops,
    matrix_flops,
    training_flops,
)
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.cache import init_cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.names import frozen_paths
from mythos_jax.training.groups import trained_part, with_part

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


EVERY = dataclasses.replace(MOE, injection="concat", readout_projection=True, lora_rank=4, tied_embedding=False)


@pytest.mark.parametrize("config", [GQA, MLA, EVERY, dataclasses.replace(MOE, readout="act")])
def test_training_everything_costs_three_forward_passes(config):
    """Two of them backward; loops without gradients one. The matrices that can be frozen are all that there are."""
    run = Config(model=config, data=DataConfig(seq_len=64))
    flops, tokens = forward_flops(config, 32), 64 * run.training.batch_size
    assert training_flops(run) == 3 * flops.at(config.loops) * tokens
    assert training_flops(run, loops=2.5) == 3 * (flops.at(0) + 2.5 * flops.loop) * tokens
    if config.readout != "act":
        depth = DepthConfig(distribution="poisson", backprop_loops=3)
        truncated = Config(model=config, data=run.data, training=TrainingConfig(depth=depth))
        assert training_flops(truncated, loops=7) == (3 * flops.at(3) + 4 * flops.loop) * tokens
    use = {path: config.loops if path.startswith("recurrence") else 1 for path in matrix_flops(config)}
    gate = 2 * config.dim * config.loops if config.readout == "act" else 0
    total = sum(flops * use[path] for path, flops in matrix_flops(config).items()) + 2 * config.dim * config.vocab_size
    assert total + gate == forward_flops(config, 0).at(config.loops)


def test_what_is_frozen_costs_less():
    """In closed form: no gradient of weights for frozen matrices, and no backward pass below what trains."""
    model = dataclasses.replace(GQA, injection="concat", loops=3, tied_embedding=False)
    every, weights = forward_flops(model, 32), forward_flops(model, 0)

    def cost(*frozen, **training):
        run = Config(model=model, data=DataConfig(seq_len=64), training=TrainingConfig(frozen=frozen, **training))
        return training_flops(run) / 64 / run.training.batch_size

    full = 3 * every.at(3)
    assert cost("embedding") == full
    assert cost("head") == full - every.head
    assert cost("prelude") == full - weights.prelude
    assert cost("embedding", "prelude") == full - 2 * every.prelude
    assert cost("embedding", "prelude", "coda", "head") == full - 2 * every.prelude - weights.coda - every.head
    assert cost("embedding", "prelude", "loop") == every.prelude + 3 * every.loop + 3 * (every.coda + every.head)
    assert cost("embedding", "prelude", "loop", "coda") == every.at(3) + every.head
    gated = dataclasses.replace(model, exit_gate=True)
    gain = TrainingConfig(objectives=ObjectivesConfig(exit_loss="gain"))
    alone = training_flops(Config(model=gated, data=DataConfig(seq_len=64), training=gain))
    assert alone / 64 / gain.batch_size == every.prelude + 3 * (every.loop + every.coda + every.head)


@pytest.mark.parametrize("frozen", [("embedding", "prelude", "head"), ("loop",)], ids=" ".join)
def test_training_flops_are_close_to_what_xla_counts(frozen):
    """Of the gradients of one loop, which XLA counts completely; without remat, as here nothing is recomputed."""
    model = dataclasses.replace(GQA, loops=1, remat="none", tied_embedding=False)
    run = Config(model=model, data=DataConfig(seq_len=64), training=TrainingConfig(frozen=frozen, batch_size=1))
    params = jax.eval_shape(Mythos(model).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(part, params, tokens):
        out = Mythos(model).apply({"params": with_part(params, part)}, tokens, loops=1)
        return jax.nn.logsumexp(out.logits, -1).sum()

    part = trained_part(params, frozen_paths(run))
    counted = jax.jit(jax.grad(loss)).lower(part, params, tokens).compile().cost_analysis()["flops"]
    # Attention is not causal in this program: each token meets all 64 keys, and not 32 on average.
    run = dataclasses.replace(run, model=dataclasses.replace(model, max_seq_len=128), data=DataConfig(seq_len=128))
    assert training_flops(run) / 2 == pytest.approx(counted, rel=0.12)


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
