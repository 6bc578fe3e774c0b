"""Weights of targets in training and evaluation, against batches in which tokens count by their number."""

import dataclasses

import jax
import numpy as np
import pytest

from mythos_jax.config import Config, DataConfig, MeshConfig, ObjectivesConfig, TrainingConfig
from mythos_jax.data.placement import batch_sharding, to_global
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.policies import fixed
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.state import Constants
from mythos_jax.sharding import make_mesh
from mythos_jax.training.step import init_state, make_train_step
from tests.tiny import GQA_LAST

MODEL = dataclasses.replace(GQA_LAST, exit_gate=True, loops=3, coda_layers=0, lora_rank=0, loop_embedding=False)
OBJECTIVES = {
    "next token": ObjectivesConfig(contraction=0.1, router_z=0.1),
    # Its loss, its entropy and its metrics are made of the losses after each loop.
    "exit gate": ObjectivesConfig(exit_loss="expected", exit_entropy=0.3),
}
ROWS, T = 4, 12
MESH = make_mesh(MeshConfig(), jax.local_devices()[:1])


def batch(weights):
    """Rows A, A, B, C with these weights for all of their targets."""
    rng = np.random.default_rng(0)
    stream = rng.integers(0, MODEL.vocab_size, (3, T + 1)).astype(np.int32)[[0, 0, 1, 2]]
    mask = np.repeat(np.float32(weights)[:, None], T, axis=1)
    mask[:, :3] = 0
    segments = np.tile(np.repeat(np.int32([1, 2]), T // 2), (ROWS, 1))
    return {"tokens": stream[:, :-1], "targets": stream[:, 1:], "mask": mask, "segment_ids": segments}


@pytest.fixture(scope="module", params=OBJECTIVES)
def step(request):
    """One step on a batch: the new state and the metrics."""
    training = TrainingConfig(
        batch_size=ROWS, objectives=OBJECTIVES[request.param], grad_accumulation_steps=2, warmup_steps=0
    )
    config = Config(model=MODEL, training=training, data=DataConfig(seq_len=T))
    train_step = make_train_step(config, MESH)
    rows = np.arange(ROWS)

    fresh = init_state(config, MESH)
    places, fresh = jax.tree.map(lambda x: x.sharding, fresh), jax.device_get(fresh)

    def run(weighted):
        state = jax.device_put(fresh, places)  # the step overwrites it
        return jax.device_get(train_step(state, to_global(batch_sharding(MESH), ROWS, rows, weighted), Constants()))

    return run


def test_a_weight_is_a_share(step):
    """A half counts half as much as one, which counts half as much as a row that is there twice."""
    (doubled, _), (halved, metrics) = step(batch([1, 1, 1, 0])), step(batch([1, 0, 0.5, 0]))
    twice = step(batch([1, 1, 1, 0]))[1]
    for name in set(metrics) - {"tokens"}:
        np.testing.assert_allclose(metrics[name], twice[name], rtol=2e-6, err_msg=name)
    assert (metrics["tokens"], twice["tokens"]) == (2 * (T - 3), 3 * (T - 3))
    # The first moment of Adam is a multiple of the gradient; what a step of Adam does depends on its sign alone.
    for a, b in zip(jax.tree.leaves(doubled.optimizer), jax.tree.leaves(halved.optimizer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


def test_other_weights_give_another_step(step):
    assert not np.isclose(step(batch([1, 0, 1, 0]))[1]["loss"], step(batch([1, 0, 0.5, 0]))[1]["loss"], rtol=1e-4)


def test_targets_without_weight_change_nothing(step):
    """Bit by bit: the loss and, through Adam's moments, every gradient."""
    plain = batch([1, 0, 0.5, 0])
    changed = plain | {"targets": np.where(plain["mask"] == 0, plain["targets"][:, ::-1], plain["targets"])}
    assert (changed["targets"] != plain["targets"]).sum() > T
    jax.tree.map(np.testing.assert_array_equal, step(plain), step(changed))


def test_a_batch_of_padding_has_no_loss(step):
    state, metrics = step(batch([0, 0, 0, 0]))
    assert metrics["loss"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.variables))


def test_small_weights_are_not_rounded(step):
    """The total weight may be below one."""
    tiny, one = batch([1, 0, 0, 0]), batch([1, 0, 0, 0])
    tiny["mask"] *= np.float32(2**-10)
    np.testing.assert_allclose(step(tiny)[1]["loss"], step(one)[1]["loss"], rtol=1e-6)


def test_evaluation_weighs_tokens_as_training_does():
    variables = jax.jit(Mythos(MODEL).init)(
        {"params": jax.random.key(0), "state": jax.random.key(0)}, np.zeros((1, 1), int)
    )

    def measured(weights):
        settings = fixed([3])
        found, _ = evaluate_depths(
            Mythos(MODEL), variables, [batch(weights)], settings, mesh=MESH, bytes_per_token=2, progress=False
        )
        return found[0]

    twice, half = measured([1, 1, 1, 0]), measured([1, 0, 0.5, 0])
    np.testing.assert_allclose([half.loss, half.value], [twice.loss, twice.value], rtol=1e-6)
    assert (half.n, twice.n) == (2 * (T - 3), 3 * (T - 3))
