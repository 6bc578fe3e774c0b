"""Routing: the bias affects the choice but never the gates; expert load; balancing. (Values: test_recurrence.py.)"""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.model.moe import MoE, Router, balanced
from tests import reference
from tests.tiny import GQA, B, T, exact

E, K = GQA.n_experts, GQA.experts_per_token
route = jax.jit(Router(GQA).apply)


def inputs(seed=0):
    random = np.random.default_rng(seed)
    kernel = random.standard_normal((GQA.dim, E)).astype(np.float32) / 6
    return random.standard_normal((20, GQA.dim)).astype(np.float32), kernel


def router(kernel, bias):
    return {"params": {"kernel": kernel}, "balance": {"bias": np.asarray(bias, np.float32)}}


def test_bias_affects_the_choice_and_not_the_gates():
    x, kernel = inputs()
    bias = np.array([0, 0, 50, 0, 0])
    unbiased_gates, unbiased, _ = route(router(kernel, np.zeros(E)), x)
    biased_gates, biased, _ = route(router(kernel, bias), x)
    assert (np.asarray(unbiased) != 2).all(axis=1).any()  # without the bias, the choice is different
    assert (biased[:, 0] == 2).all()  # the bias puts its expert first
    probabilities = np.asarray(jax.nn.softmax(x @ kernel), np.float64)
    for gates, experts in [(unbiased_gates, unbiased), (biased_gates, biased)]:
        expected = np.take_along_axis(probabilities, np.asarray(experts), axis=1)
        np.testing.assert_allclose(gates, expected / expected.sum(-1, keepdims=True), rtol=1e-4)
        np.testing.assert_allclose(np.sum(gates, -1), 1, rtol=1e-5)


def test_gates_are_finite_when_the_bias_chooses_impossible_experts():
    x, kernel = inputs()
    x[:, 0], kernel[0] = 1, [500, -500, -500, -500, -500]
    gates, experts, _ = route(router(kernel, [-5000, 0, 0, 0, 0]), x)
    assert (experts != 0).all()
    assert np.isfinite(gates).all()


def test_layer_equals_dense_loop_over_experts_and_counts_load():
    config, random = replace(GQA, n_shared_experts=2, shared_expert_dim=12), np.random.default_rng(0)
    module = MoE(config)
    x = random.standard_normal((B, T, config.dim)).astype(np.float32)
    counted = np.arange(T) < np.array([[8], [3]])
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, counted))
    weights = jax.tree.map(lambda s: random.standard_normal(s.shape).astype(np.float32) / 4, shapes)
    y, stats, _ = jax.jit(module.apply)(weights, x, counted)
    load = stats.load_E

    bias = weights["balance"]["router"]["bias"]
    expected, chosen = reference.moe(config, exact(weights["params"]), x.reshape(-1, config.dim).astype(float), bias)
    np.testing.assert_allclose(y.reshape(-1, config.dim), expected, rtol=0, atol=1e-4)
    tokens = np.flatnonzero(counted.reshape(-1))
    np.testing.assert_array_equal(load, np.bincount(np.concatenate([chosen[n] for n in tokens]), minlength=E))
    assert load.sum() == counted.sum() * K


def test_log_partition_is_summed_over_counted_tokens():
    x, kernel = inputs()
    _, _, z = route(router(0 * kernel, np.zeros(E)), x)
    np.testing.assert_allclose(z, np.log(E), rtol=1e-6)


def test_balancing_approaches_equal_load():
    random = np.random.default_rng(0)
    logits = random.standard_normal((500, E)) + np.array([2, 1, 0, 0, -2])  # some experts are chosen far more often

    def load(bias):
        chosen = np.argsort(-(logits + np.asarray(bias)), axis=1)[:, :K]
        return np.bincount(chosen.reshape(-1), minlength=E).astype(np.float32)

    bias, first = jnp.zeros(E), load(np.zeros(E))
    for _ in range(200):
        bias = balanced(bias, load(bias), 0.02)
    last = load(bias)
    assert first.max() / first.mean() > 1.8
    assert last.max() / last.mean() < 1.1
    np.testing.assert_allclose(bias.sum(), 0, atol=1e-5)  # only differences affect the choice


def test_balancing_step():
    np.testing.assert_allclose(balanced(jnp.zeros(4), jnp.array([4.0, 0, 2, 2]), 0.1), [-0.1, 0.1, 0, 0], atol=1e-7)
