"""Schedules, weight decay and the AdamW step against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mythos_jax.config import ModelConfig, TrainingConfig
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.training.optimizer import (
    decay_mask,
    decay_start,
    make_optimizer,
    path_names,
    rounded_at_random,
    schedule,
)


def test_learning_rate_warms_up_from_above_zero_and_decays_as_a_cosine():
    rate = schedule(TrainingConfig(steps=100, warmup_steps=10, final_learning_rate_fraction=0.1), 1.0)
    assert rate(0) == pytest.approx(1 / 11)
    assert rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)


def test_wsd_and_constant_schedules():
    config = TrainingConfig(
        steps=100, warmup_steps=10, final_learning_rate_fraction=0.1, schedule="wsd", decay_fraction=0.2
    )
    rate = schedule(config, 1.0)
    assert decay_start(config) == 80
    assert [float(rate(n)) for n in (10, 79, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.55, 0.1])
    rate = schedule(dataclasses.replace(config, schedule="constant"), 1.0)
    assert [float(rate(n)) for n in (0, 10, 100)] == pytest.approx([1 / 11, 1, 1])


def test_only_matrices_decay():
    model = ModelConfig(
        feed_forward="moe", n_experts=4, experts_per_token=2, expert_dim=16, lora_rank=4, qk_bias=True, readout="act"
    )
    flags = jax.tree_util.tree_leaves_with_path(decay_mask(abstract_variables(model)["params"]))
    exempt = {".".join(path_names(path)[-2:]) for path, flag in flags if not flag}
    assert exempt == {
        "attention_norm.scale",
        "feed_forward_norm.scale",
        "final_norm.scale",
        "norm.scale",
        "lora.scale",
        "attention.q_bias",
        "attention.k_bias",
        "cell.halt_bias",
        "injection.log_a",
        "injection.log_dt",
        "injection.b",
    }


def test_adamw_step_by_hand():
    config = TrainingConfig(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.5, gradient_clip=1.0, eps=1e-8)
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.array([[2.0]]), "scale": jnp.array([2.0])}
    gradients = {"kernel": jnp.array([[3.0]]), "scale": jnp.array([4.0])}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # Clipped to norm 1 the gradients are 0.6 and 0.8; Adam's first step is the sign; the matrix also decays.
    assert updates["kernel"][0, 0] == pytest.approx(-0.1 * (1 + 0.5 * 2.0), rel=1e-5)
    assert updates["scale"][0] == pytest.approx(-0.1, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_in_bfloat16_take_half_the_memory(optimizer):
    params = {"feed_forward": {"up": {"kernel": jnp.ones((4, 8))}}, "scale": jnp.ones(8)}
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        update = make_optimizer(TrainingConfig(optimizer=optimizer, optimizer_dtype=dtype))
        state = update.init(params)
        moments = [x for x in jax.tree.leaves(state) if x.size >= 8]
        assert {x.dtype for x in moments} == {jnp.dtype(dtype)}
        sizes[dtype] = sum(x.nbytes for x in moments)
        later = jax.jit(update.update)(params, state, params)[1]
        assert [x.dtype for x in jax.tree.leaves(later)] == [x.dtype for x in jax.tree.leaves(state)]
    assert sizes["bfloat16"] * 2 == sizes["float32"]


def falling_second_moment(dtype):
    """After one step with gradients of 1, and 500 with gradients of 0; b2 = 0.999."""
    optimizer = make_optimizer(TrainingConfig(b2=0.999, gradient_clip=0, optimizer_dtype=dtype))
    params = {"scale": jnp.ones(4096)}

    def step(state, gradient):
        return optimizer.update({"scale": jnp.full(4096, gradient)}, state, params)[1], None

    state, _ = jax.lax.scan(step, optimizer.init(params), jnp.zeros(501).at[0].set(1.0))
    return np.asarray(optax.tree.get(state, "nu")["scale"], np.float32)


def test_a_second_moment_in_bfloat16_falls_as_slowly_as_one_in_float32():
    """Each step takes a thousandth, less than half a step of bfloat16: rounded to nearest, it would stay forever."""
    exact, narrow = falling_second_moment("float32"), falling_second_moment("bfloat16")
    np.testing.assert_allclose(exact, 1e-3 * 0.999**500, rtol=1e-4)
    assert narrow.mean() == pytest.approx(exact[0], rel=0.01)


def test_numbers_rounded_at_random_are_right_on_average():
    x = jnp.array([1 + 2**-9, -1 - 2**-9, 3e-39, 0.0, jnp.inf, -jnp.inf, 1.5])
    rounded = jax.vmap(rounded_at_random, (None, 0))(x, jax.random.split(jax.random.key(0), 4096))
    assert rounded.dtype == jnp.bfloat16
    near = np.asarray(rounded[:, :2], np.float32)
    assert set(np.unique(near)) == {-1 - 2**-7, -1.0, 1.0, 1 + 2**-7}
    np.testing.assert_allclose(near.mean(0), x[:2], atol=4 * 2**-7 * np.sqrt(3) / 4 / 64)  # four standard errors
    np.testing.assert_array_equal(np.asarray(rounded[:, 3:], np.float32), np.broadcast_to(x[3:], (4096, 4)))
    assert np.isnan(np.asarray(rounded_at_random(jnp.array([jnp.nan]), jax.random.key(0)), np.float32)).all()
