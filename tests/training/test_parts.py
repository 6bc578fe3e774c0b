"""Optimizer, schedule, loss and log against closed forms."""

import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config import ModelConfig, TrainingConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.ops.cross_entropy import cross_entropy
from mythos_jax.training.metrics import MetricsLog, TensorBoardWriter, check_writers, plain
from mythos_jax.training.optimizer import decays, make_optimizer, path_names, schedule


def test_learning_rate_warms_up_from_above_zero_and_falls_as_a_cosine():
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
    assert [float(rate(n)) for n in (10, 79, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.55, 0.1])
    rate = schedule(dataclasses.replace(config, schedule="constant"), 1.0)
    assert [float(rate(n)) for n in (0, 10, 100)] == pytest.approx([1 / 11, 1, 1])


def test_only_matrices_decay():
    model = ModelConfig(
        feed_forward="moe", n_experts=4, experts_per_token=2, expert_dim=16, lora_rank=4, qk_bias=True, readout="act"
    )
    flags = jax.tree_util.tree_leaves_with_path(decays(abstract_variables(model)["params"]))
    spared = {".".join(path_names(path)[-2:]) for path, flag in flags if not flag}
    assert spared == {
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


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 16])
def test_chunked_cross_entropy_is_the_plain_one(chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    features, table = jax.random.normal(keys[0], (3, 13, 8)), jax.random.normal(keys[1], (40, 8))
    targets = jax.random.randint(keys[2], (3, 13), 0, 40)

    def plain(features, table):
        p = jax.nn.softmax(features @ table.T)
        return -jnp.log(jnp.take_along_axis(p, targets[..., None], -1))[..., 0]

    np.testing.assert_allclose(cross_entropy(features, table, targets, chunk), plain(features, table), atol=1e-5)
    ours = jax.grad(lambda *x: cross_entropy(*x, targets, chunk).sum(), (0, 1))(features, table)
    theirs = jax.grad(lambda *x: plain(*x).sum(), (0, 1))(features, table)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_log_is_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write(step, {"loss": plain(np.float32(step)), "expert_load": plain(np.full((1, 2), 0.5))})
    log.close()
    path.open("a").write('{"step": 6, "lo')
    log = MetricsLog(path, restored_step=3)
    log.write(4, {"loss": 0.0})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["expert_load"] == [[0.5, 0.5]]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_writer_that_is_not_installed_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed; allowed: pip install 'mythos-jax\[{name}\]'"):
        check_writers((name,))


def test_tensorboard_reads_each_step_once(tmp_path):
    """After a resume from step 2, what the first start said of step 3 is forgotten."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for restored, steps, loss in [(0, [1, 2, 3], 1.0), (2, [3, 4], 2.0)]:
        writer = TensorBoardWriter(tmp_path, restored)
        for step in steps:
            writer.write(step, {"loss": loss + step, "expert_load": [[0.5, 0.5]]})
        writer.close()
        time.sleep(1.1)  # files are read in the order of their names, which tell the second
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 3.0), (3, 5.0), (4, 6.0)]
