"""Random depth: the draws against their published moments, and truncated backpropagation against plain loops."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mythos_jax.config import Config, DepthConfig, ModelConfig, TrainingConfig, has_static_depth
from mythos_jax.errors import ConfigError
from mythos_jax.model.injection import NoInjection, register_injection
from mythos_jax.model.mythos import Mythos
from mythos_jax.training.depth import (
    curriculum_mean,
    draw_depths,
    loops_with_gradient,
    loops_without_gradient,
    order_by_depth,
    truncated_forward,
)
from tests.tiny import GQA, GQA_LAST, MLA, variables

GATED = dataclasses.replace(GQA_LAST, exit_gate=True)


def with_depth(model=None, seed=0, **fields):
    training = TrainingConfig(seed=seed, depth=DepthConfig(**fields))
    return Config(model=model or ModelConfig(loops=8), training=training)


def many(config, rows=4096, steps=25):
    draw = jax.jit(lambda step: draw_depths(config, step, rows))
    return np.concatenate([draw(step) for step in range(steps)])


def test_huginn_moments():
    """Mean 33, median 29 for mean_recurrence 32 (arXiv 2502.05171, figure 3); P(n < 8) = 0.9 %, p99 = 94."""
    depths = many(with_depth(distribution="lognormal_poisson", mean_loops=32, max_loops=10_000))
    assert depths.mean() == pytest.approx(33, abs=0.2)
    assert np.median(depths) == pytest.approx(29, abs=0.5)
    assert np.quantile(depths, 0.99) == pytest.approx(94, abs=2)
    assert (depths < 8).mean() == pytest.approx(0.009, abs=0.002)


def test_parcae_moments():
    """max(1, Poisson(8)), one draw per row."""
    depths = many(with_depth(distribution="poisson", max_loops=1000))
    assert depths.mean() == pytest.approx(8 + np.exp(-8), abs=0.05)
    assert depths.var() == pytest.approx(8, abs=0.2)
    assert depths.min() == 1


def test_uniform_and_fixed():
    depths = many(with_depth(distribution="uniform"))
    np.testing.assert_allclose(np.bincount(depths)[1:] / len(depths), 1 / 15, atol=0.005)
    assert set(many(with_depth(distribution="fixed"), steps=1)) == {8}


def test_draws_are_bounded_and_one_a_batch_where_asked():
    assert many(with_depth(distribution="poisson", max_loops=9), steps=3).max() == 9
    per_batch = draw_depths(with_depth(distribution="poisson", sample_per="batch"), jnp.int32(3), 64)
    assert len(set(per_batch.tolist())) == 1


def test_draws_are_a_function_of_seed_and_step():
    config = with_depth(distribution="poisson")
    a, b = draw_depths(config, jnp.int32(5), 64), draw_depths(config, jnp.int32(6), 64)
    np.testing.assert_array_equal(a, draw_depths(config, jnp.int32(5), 64))
    assert (a != b).any()
    assert (a != draw_depths(with_depth(distribution="poisson", seed=1), jnp.int32(5), 64)).any()


def test_parts_of_accumulation_have_rows_of_similar_depth():
    depths, parts = np.random.default_rng(0).integers(1, 30, 24), 3
    ordered = depths[order_by_depth(jnp.array(depths), parts)]
    by_part = [ordered[i::parts] for i in range(parts)]
    assert sorted(ordered) == sorted(depths)
    assert by_part[0].max() <= by_part[1].min()
    assert by_part[1].max() <= by_part[2].min()


def test_estimate_of_loops_without_gradient():
    """Of each part's deepest row, on average over parts."""
    config = with_depth(distribution="poisson", backprop_loops=8)
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, batch_size=64, grad_accumulation_steps=4)
    )
    expected = [
        max(0, part.max() - 8)
        for step in range(8)
        for part in np.split(np.sort(draw_depths(config, jnp.int32(step), 64)), 4)
    ]
    assert loops_without_gradient(config, 8) == pytest.approx(np.mean(expected))


def test_curriculum_raises_the_mean():
    config = with_depth(distribution="poisson", mean_loops=16, max_loops=100, curriculum_steps=100)
    means = [float(draw_depths(config, jnp.int32(step), 20_000).mean()) for step in (50, 100, 500)]
    assert means == pytest.approx([8.5, 16, 16], abs=0.15)


@pytest.mark.parametrize(("kind", "at"), [("linear", lambda p: p), ("1-sqrt", lambda p: 1 - (1 - p) ** 0.5)])
@pytest.mark.parametrize("length", [{"curriculum_steps": 40}, {"curriculum_fraction": 0.4}])
def test_curricula_in_closed_form(kind, at, length):
    """1 + (mean - 1) f(share of the curriculum that is done), and the full mean from its end on."""
    training = TrainingConfig(steps=100, depth=DepthConfig(mean_loops=9, curriculum=kind, **length))
    config = Config(model=ModelConfig(), training=training)
    assert not has_static_depth(config)
    for step in (0, 1, 10, 30, 39, 40, 41, 99, 1000):
        truth = 1 + 8 * at(min(step / 40, 1))
        assert curriculum_mean(config, jnp.int32(step)) == pytest.approx(truth, rel=1e-5)
        # `fixed` rounds the mean; a function of (seed, step) alone.
        depths = draw_depths(config, jnp.int32(step), 3)
        assert set(depths.tolist()) == {round(truth)}
        np.testing.assert_array_equal(depths, jax.jit(lambda step: draw_depths(config, step, 3))(step))


def test_backpropagation_up_to_the_mean():
    """min(8, mean) loops have gradients, the mean rounded up to a whole number (arXiv 2511.07384)."""
    fields = {"distribution": "lognormal_poisson", "mean_loops": 12, "max_loops": 40, "backprop_loops": 8}
    rising = with_depth(**fields, curriculum_steps=110, backprop_up_to_mean=True)
    most = [int(loops_with_gradient(rising, jnp.int32(step))) for step in (0, 1, 10, 11, 60, 69, 70, 71, 110, 500)]
    assert most == [1, 2, 2, 3, 7, 8, 8, 8, 8, 8]
    assert loops_with_gradient(with_depth(**fields, curriculum_steps=110), jnp.int32(0)) == 8
    constant = with_depth(**{**fields, "mean_loops": 4}, backprop_up_to_mean=True)
    assert loops_with_gradient(constant, jnp.int32(0)) == 4


def test_curriculum_errors():
    with pytest.raises(ConfigError, match=r"training\.depth\.curriculum: got 'sqrt', allowed: linear, 1-sqrt"):
        DepthConfig(curriculum="sqrt")
    with pytest.raises(ConfigError, match=r"curriculum_fraction: got 0\.5, allowed: 0 with curriculum_steps"):
        DepthConfig(curriculum_steps=3, curriculum_fraction=0.5)
    with pytest.raises(ConfigError, match=r"curriculum_fraction: got 75, allowed: a fraction in \[0, 1\]"):
        DepthConfig(curriculum_fraction=75)
    with pytest.raises(ConfigError, match=r"backprop_up_to_mean: got True, allowed: false with readout act"):
        with_depth(ModelConfig(readout="act"), backprop_up_to_mean=True)


def test_act_needs_every_loop():
    act = ModelConfig(readout="act")
    with pytest.raises(ConfigError, match=r"training\.depth\.backprop_loops: got 4, allowed: null with readout act"):
        with_depth(act, distribution="poisson", backprop_loops=4)
    shared = ModelConfig(loop_kv="first")  # keys and values of the first loop would have no gradient
    with_depth(shared, distribution="poisson")
    with pytest.raises(ConfigError, match=r"backprop_loops: got 4, allowed: null with model\.loop_kv first"):
        with_depth(shared, distribution="poisson", backprop_loops=4)
    with pytest.raises(ConfigError, match=r"backprop_up_to_mean: got True, allowed: false with model\.loop_kv first"):
        with_depth(shared, distribution="poisson", backprop_up_to_mean=True)


TOKENS = jax.random.randint(jax.random.key(7), (3, 8), 0, 40)


def run(variables, config, tokens, loops, backprop_loops):
    """The forward pass, with gradients through the last `backprop_loops` loops (None: all of a fixed depth)."""
    model = Mythos(config)
    if backprop_loops is None:
        return model.apply(variables, tokens, loops=loops)
    forward = partial(truncated_forward, backprop_loops=backprop_loops)
    out = model.apply(variables, tokens, None, loops, None, method=forward)
    return out.replace(logits=model.apply(variables, out.features, method="head"))


def gradients(config, loops, backprop_loops, rows=slice(None)):
    """Gradient of a sum over the logits of some rows."""
    weights = jax.random.normal(jax.random.key(1), (3, 8, 40))[rows]

    def score(params, loops):
        out = run({**variables(config), "params": params}, config, TOKENS[rows], loops, backprop_loops)
        return (out.logits * weights).sum(), out

    static = (1,) if isinstance(loops, int) else ()
    return jax.jit(jax.grad(score, has_aux=True), static_argnums=static)(variables(config)["params"], loops)


def assert_close(a, b, atol=2e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-3), a, b)


def test_full_backpropagation_at_mixed_depths_is_that_of_each_row():
    """k at the bound: no loop is without gradient, so a batch's gradient is the sum of its rows' at fixed depth."""
    depths = [3, 1]
    found, out = gradients(GQA, jnp.array(depths), 3, slice(2))
    alone = [gradients(GQA, n, None, slice(i, i + 1)) for i, n in enumerate(depths)]
    assert_close(found, jax.tree.map(lambda *parts: sum(parts), *[g for g, _ in alone]))
    for i, (_, single) in enumerate(alone):
        np.testing.assert_allclose(out.logits[i], single.logits[0], atol=1e-5)
        np.testing.assert_array_equal(out.loops[i], single.loops[0])


@pytest.mark.parametrize("config", [GQA_LAST, MLA], ids=["gqa", "mla"])
def test_truncated_gradient_is_that_of_the_last_loops_from_a_constant_state(config):
    """An independent statement of truncation: run n loops plainly, then differentiate k more from that state."""
    n, k = 3, 2
    # The reference counts its loops from 0 again, so nothing may depend on the loop's index.
    plain = dataclasses.replace(config, loop_embedding=False, lora_rank=0)
    held = variables(plain)
    found, out = gradients(plain, jnp.array([n + k] * 3), k)
    assert set(out.loops.ravel().tolist()) == {n + k}
    assert out.aux.change_LBT.shape == (k, 3, 8)
    state = raw_state(plain, held, n)
    weights = jax.random.normal(jax.random.key(1), (3, 8, 40))

    def score(params):
        out = Mythos(plain).apply({**held, "params": params}, TOKENS, loops=k, initial_state=state)
        return (out.logits * weights).sum()

    assert_close(found, jax.jit(jax.grad(score))(held["params"]))


def raw_state(config, held, loops):
    """The state after some loops, which is what the coda gets if nothing comes between."""
    return jax.jit(lambda held: Mythos(config).apply(held, TOKENS, loops=loops).state)(held)


@pytest.mark.parametrize("config", [GQA, dataclasses.replace(GATED, remat="attention")], ids=["moe_act", "gate"])
def test_loops_that_no_row_runs_are_left_out(config):
    """Loss, gradients, traces and router statistics are those of the scan that computes every loop."""
    held, tokens, weights = variables(config), TOKENS[:2], jax.random.normal(jax.random.key(1), (2, 8, 40))

    @partial(jax.jit, static_argnums=1)
    @partial(jax.value_and_grad, has_aux=True)
    def found(params, skip):
        forward = partial(truncated_forward, backprop_loops=5, skip_idle=skip, trace_states=config is not GQA)
        model, loops = Mythos(config), jnp.array([2, 3])
        out = model.apply({**held, "params": params}, tokens, None, loops, None, method=forward)
        logits = model.apply({**held, "params": params}, out.features, method="head")
        aux = [out.aux.change_LBT, out.aux.act_weight_LBT, out.aux.router_z]
        extra = sum((x**2).sum() for x in aux if x is not None)
        return (logits * weights).sum() + extra, (out, logits)

    value, gradient = found(held["params"], False)
    skipped, same = found(held["params"], True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), value, skipped)
    assert_close(gradient, same, atol=1e-5)


def test_a_traced_limit_is_fewer_loops_with_gradients():
    held, weights = variables(GQA_LAST)["params"], jax.random.normal(jax.random.key(1), (3, 8, 40))

    @partial(jax.jit, static_argnums=2)
    @jax.grad
    def gradient(params, limit, count):
        forward = partial(truncated_forward, backprop_loops=count, limit=limit, skip_idle=True)
        out = Mythos(GQA_LAST).apply({"params": params}, TOKENS, None, jnp.array([4, 3, 1]), None, method=forward)
        return (Mythos(GQA_LAST).apply({"params": params}, out.features, method="head") * weights).sum()

    assert_close(gradient(held, jnp.int32(2), 4), gradient(held, None, 2), atol=1e-5)


class Counted(NoInjection):
    """Counts the loops that are computed."""

    computed = 0

    def enter(self, h_BTD, e_BTD):
        def count(_):
            Counted.computed += 1

        jax.debug.callback(count, h_BTD[0, 0, 0])
        return h_BTD


def test_only_the_loops_that_a_row_runs_are_computed():
    register_injection("counted", Counted)
    config = dataclasses.replace(GQA_LAST, injection="counted", initial_state="injected")
    held = jax.jit(Mythos(config).init)(jax.random.key(0), TOKENS)

    @partial(jax.jit, static_argnums=1)
    def features(loops, skip):
        forward = partial(truncated_forward, backprop_loops=6, skip_idle=skip)
        return Mythos(config).apply(held, TOKENS, None, loops, None, method=forward).features

    def computed(depths, skip):
        jax.effects_barrier()
        Counted.computed = 0
        jax.block_until_ready(features(jnp.array(depths), skip))
        jax.effects_barrier()
        return Counted.computed

    assert computed([1, 1, 2], False) == 6
    assert [computed([1, 1, n], True) for n in (1, 2, 6, 9)] == [1, 2, 6, 9]
    assert features._cache_size() == 2


def test_memory_does_not_grow_with_loops_without_gradient():
    config, held = GQA_LAST, variables(GQA_LAST)
    tokens = jnp.zeros((4, 16), jnp.int32)

    def score(params, loops, k):
        return run({**held, "params": params}, config, tokens, loops, k).logits.var()

    def program(k):
        return jax.jit(jax.grad(score), static_argnums=2).lower(held["params"], jnp.full(4, 2), k).compile()

    # The number of loops without gradient is traced: one program, one memory, for any depth. More loops with
    # gradient do cost memory.
    two, eight = program(2), program(8)
    memories = [compiled.memory_analysis().temp_size_in_bytes for compiled in (two, eight)]
    assert memories[1] > 1.5 * memories[0]
    norms = {float(optax.global_norm(two(held["params"], jnp.full(4, depth)))) for depth in (2, 5, 50)}
    assert len(norms) == 3
