"""Schedules, weight decay and the AdamW step against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mythos_jax.config import ModelConfig, TrainingConfig
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.training.optimizer import decay_mask, decay_start, make_optimizer, path_names, schedule


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
