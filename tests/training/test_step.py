"""The training step: accumulation, skipped steps, averages, Muon, objectives, against closed forms or plain steps."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config import Config, DepthConfig, MeshConfig, ObjectivesConfig, TrainingConfig
from mythos_jax.data.placement import batch_sharding, to_global
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.state import Constants
from mythos_jax.sharding import make_mesh
from mythos_jax.training.depth import draw_depths
from mythos_jax.training.objectives import contraction, ponder_cost, ponder_prior
from mythos_jax.training.optimizer import optimizer_groups
from mythos_jax.training.step import init_state, make_train_step
from tests.tiny import TRAINED

MESH = MeshConfig()


def config_with(model=TRAINED, **training):
    return Config(
        model=dataclasses.replace(model, max_seq_len=128), training=TrainingConfig(**{"batch_size": 16, **training})
    )


def batches(n, rows=16):
    rng = np.random.default_rng(0)
    for _ in range(n):
        tokens = rng.integers(0, 64, (rows, 13)).astype(np.int32)
        mask = np.ones((rows, 12), bool)
        mask[3, 5:] = False
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


@cache
def run(config, steps, devices=1):
    """States and metrics after each step; tests share the runs that they have in common."""
    mesh = make_mesh(MESH, jax.local_devices()[:devices])
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    states, metrics = [jax.device_get(state)], []
    for batch in batches(steps):
        state, found = step(state, to_global(batch_sharding(mesh), 16, np.arange(16), batch), Constants())
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


RANDOM = config_with(
    depth=DepthConfig(distribution="poisson", mean_loops=3, max_loops=5, backprop_loops=2),
    objectives=ObjectivesConfig(router_z=0.1),
    ema_decay=0.9,
)


def test_accumulated_parts_on_four_devices_are_the_whole_batch_on_one_at_random_depth():
    training = dataclasses.replace(RANDOM.training, grad_accumulation_steps=2)
    whole, parts = run(RANDOM, 2)[1], run(dataclasses.replace(RANDOM, training=training), 2, 4)[1]
    for a, b in zip(whole, parts, strict=True):
        for name in ["loss", "gradient_norm", "mean_loops", "expert_load", "tokens", "router_z"]:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)
        assert a["mean_loops"] == b["mean_loops"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=0, atol=1e-5)
    assert whole[0]["mean_loops"] != whole[1]["mean_loops"]


def test_skipped_loops_do_not_depend_on_the_devices():
    """During a curriculum: four devices leave out the same loops as one, experts included."""
    depth = DepthConfig(distribution="uniform", mean_loops=3, curriculum_steps=4)
    rising = config_with(depth=depth, grad_accumulation_steps=2)
    one, four = (run(rising, 2, devices)[1] for devices in (1, 4))
    for a, b in zip(one, four, strict=True):
        for name in ("loss", "gradient_norm", "mean_loops", "expert_load"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    assert one[0]["mean_loops"] == 1


def test_documents_in_one_row_are_as_if_alone():
    """Two documents of six tokens per row, at random depth, accumulated and sharded: the loss is that of the documents
    in rows of their own. Positions continue through the row: RoPE depends on their differences only."""
    dense = dataclasses.replace(RANDOM.model, feed_forward="dense")
    config = dataclasses.replace(
        RANDOM, model=dense, training=dataclasses.replace(RANDOM.training, grad_accumulation_steps=2)
    )
    mesh = make_mesh(MESH, jax.local_devices()[:4])
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    (batch,) = batches(1)
    batch["segment_ids"] = np.where(batch["mask"], np.arange(12) // 6 + 1, 0).astype(np.int32)
    split = {name: array.reshape(32, 6) for name, array in batch.items() if name != "segment_ids"}
    loops = draw_depths(config, jnp.int32(0), 16)
    model, variables = Mythos(config.model), jax.device_get(state.variables)
    nats_of = jax.jit(lambda batch, loops: token_loss(model, variables, batch, loops=loops)[0])
    alone = np.asarray(nats_of(split, jnp.repeat(loops, 2))).reshape(16, 12)
    np.testing.assert_allclose(nats_of(batch, loops), alone, atol=1e-5)
    assert np.abs(nats_of({**batch, "segment_ids": np.ones((16, 12), np.int32)}, loops) - alone)[:, 6:].max() > 1e-3
    _, metrics = step(state, to_global(batch_sharding(mesh), 16, np.arange(16), batch), Constants())
    assert metrics["loss"] == pytest.approx(alone.sum() / batch["mask"].sum(), abs=1e-5)


def test_average_of_weights():
    states, _ = run(RANDOM, 2)
    expected = states[0].variables["params"]
    for state in states[1:]:
        expected = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, expected, state.variables["params"])
    assert_close(states[-1].average, expected, atol=1e-7)


def test_a_bad_step_is_skipped_and_counted():
    """A learning rate beyond reason ruins the weights at step 1; with `skip` its spikes change nothing after that."""
    config = config_with(bad_steps="skip", spike_factor=1.5, warmup_steps=0, learning_rate=50.0, gradient_clip=0.0)
    states, metrics = run(config, 4)
    assert not metrics[0]["bad"]
    bad = [bool(m["bad"]) for m in metrics]
    assert sum(bad) == states[-1].skipped > 0
    for before, after, skipped in zip(states[:-1], states[1:], bad, strict=True):
        assert after.step == before.step + 1
        same = jax.tree.map(np.array_equal, before.variables["params"], after.variables["params"])
        assert all(jax.tree.leaves(same)) == skipped
        if skipped:
            jax.tree.map(np.testing.assert_array_equal, before.optimizer, after.optimizer)
            assert after.loss_mean == before.loss_mean


def test_muon_moves_matrices_by_near_orthogonal_steps_and_leaves_the_rest_to_adamw():
    config = config_with(optimizer="muon", weight_decay=0.0, warmup_steps=0, gradient_clip=0.0)
    states, _ = run(config, 1)
    before, after = (state.variables["params"] for state in states)
    groups = optimizer_groups(before)
    assert groups["embedding"] == groups["final_norm"]["scale"] == "adamw"
    assert groups["recurrence"]["cell"]["layer_0"]["moe"]["router"]["kernel"] == "adamw"

    def singular(path, shape):
        old, new = before, after
        for name in path.split("."):
            old, new = old[name], new[name]
        update = (new - old).reshape(shape)
        return np.linalg.svd(update, compute_uv=False)

    # Newton-Schulz leaves singular values between about 0.7 and 1.2 of the learning rate.
    for path, shape in [("prelude_0.feed_forward.up.kernel", (32, 48)), ("prelude_0.attention.q.kernel", (32, 32))]:
        values = singular(path, shape) / config.training.muon_learning_rate
        assert 0.6 < np.quantile(values, 0.1)  # directions that the gradient lacks stay small
        assert values.max() < 1.3
    experts = after["recurrence"]["cell"]["layer_0"]["moe"]["up"] - before["recurrence"]["cell"]["layer_0"]["moe"]["up"]
    norms = np.linalg.norm(experts.reshape(4, -1), axis=-1)
    assert norms.min() > 0.5 * norms.max()


def test_objectives_by_hand():
    weights = jnp.array([0.5, 0.3, 0.2]).reshape(3, 1, 1)
    assert ponder_cost(weights)[0, 0] == pytest.approx(0.5 + 0.6 + 0.6)
    prior = np.array([0.2, 0.16, 0.128])
    prior /= prior.sum()
    w = np.array([0.5, 0.3, 0.2])
    assert ponder_prior(weights, 0.2)[0, 0] == pytest.approx((w * np.log(w / prior)).sum(), rel=1e-5)
    assert ponder_prior(jnp.asarray(prior, jnp.float32).reshape(3, 1, 1), 0.2)[0, 0] == pytest.approx(0, abs=1e-6)
    assert ponder_prior(weights, 0.0)[0, 0] == pytest.approx((w * np.log(3 * w)).sum(), rel=1e-5)  # a uniform prior
    assert contraction(jnp.array([0.5, 0.7, 0.1, 0.2]).reshape(4, 1, 1))[0, 0] == pytest.approx(0.2 + 0.1)


def test_objectives_are_logged_one_by_one():
    act = dataclasses.replace(TRAINED, readout="act", loops=4)
    weights = ObjectivesConfig(ponder_cost=0.1, ponder_prior=0.1, contraction=0.1, router_z=0.1)
    _, metrics = run(config_with(act, objectives=weights, learning_rate=1e-2, warmup_steps=0), 4)
    for name in ["ponder_cost", "ponder_prior", "contraction", "router_z"]:
        assert all(np.isfinite(row[name]) for row in metrics)
    # Thinking costs, so the expected number of loops falls; the next-token loss alone, on noise, gives no such push.
    assert metrics[-1]["ponder_cost"] < metrics[0]["ponder_cost"] - 0.01
