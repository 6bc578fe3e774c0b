"""Frozen parameters and learning rates by group: against steps by hand, and what a run leaves bit for bit."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mythos_jax.config import MeshConfig, ObjectivesConfig, TrainingConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import weight_shapes
from mythos_jax.model.names import frozen_paths, parameter_paths, select
from mythos_jax.runs.state import Constants
from mythos_jax.sharding import make_mesh
from mythos_jax.training.groups import rate_factors, trained_part, with_part
from mythos_jax.training.optimizer import make_optimizer, schedule
from mythos_jax.training.resume import check_resume
from mythos_jax.training.step import abstract_state, jitted_step
from mythos_jax.training.train import train
from mythos_jax.typed import to_dict
from tests.tiny import DENSE, GQA_LAST, HUGINN, PARCAE, TRAINED
from tests.training.test_step import config_with, run

FROZEN = ("embedding", "prelude", "moe", "*norm")


def flat(tree):
    return flatten_dict(tree, sep=".")


def test_frozen_parameters_keep_their_bits_and_have_no_state():
    """Weight decay, the moving average, the router's balance and Muon leave them alone; all others train."""
    config = config_with(
        frozen=FROZEN, ema_decay=0.9, optimizer="muon", weight_decay=0.5, grad_accumulation_steps=2, warmup_steps=0
    )
    states, metrics = run(config, 2)
    before, after = flat(states[0].variables["params"]), flat(states[-1].variables["params"])
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert same == frozen_paths(config) == select(config.model, FROZEN, "")
    assert 0 < len(same) < len(before)
    average = flat(states[-1].average)
    assert {path for path in before if np.array_equal(before[path], average[path])} == same
    jax.tree.map(np.testing.assert_array_equal, states[0].variables["balance"], states[-1].variables["balance"])
    # One or two moments of the size of what trains: Muon has one.
    sizes = [leaf.size for leaf in jax.tree.leaves(states[0].optimizer) if leaf.size > 3]
    trained = sum(leaf.size for path, leaf in before.items() if path not in same)
    assert trained <= sum(sizes) <= 2 * trained
    assert np.isfinite(metrics[-1]["gradient_norm"])


def test_gradients_of_the_others_are_those_of_a_run_that_trains_all():
    """The first step, without clipping, is that of the run that trains all; the norm is that of what trains."""
    plain = config_with(optimizer="muon", weight_decay=0.0, warmup_steps=0, gradient_clip=0.0)
    frozen = dataclasses.replace(plain, training=dataclasses.replace(plain.training, frozen=("loop", "embedding")))
    (start, full), all_metrics = run(plain, 1)
    (_, part), metrics = run(frozen, 1)
    kept = frozen_paths(frozen)
    for path, leaf in flat(part.variables["params"]).items():
        truth = flat((start if path in kept else full).variables["params"])[path]
        np.testing.assert_allclose(leaf, truth, rtol=0, atol=1e-5, err_msg=path)
    assert metrics[0]["loss"] == pytest.approx(all_metrics[0]["loss"], abs=1e-6)
    assert 0 < metrics[0]["gradient_norm"] < all_metrics[0]["gradient_norm"]


def test_the_program_has_no_gradients_of_what_is_frozen():
    """The lower the first part that trains, the more products a step has: gradients of activations end there."""
    model, mesh = dataclasses.replace(TRAINED, feed_forward="dense"), make_mesh(MeshConfig(), jax.local_devices()[:1])
    batch = {name: jax.ShapeDtypeStruct((16, 12), jnp.int32) for name in ("tokens", "targets", "mask")}

    def products(*frozen):
        config = config_with(model, frozen=frozen)
        with jax.set_mesh(mesh):
            text = jitted_step(config).lower(abstract_state(config, mesh), batch, Constants()).as_text()
        return text.count("stablehlo.dot_general")

    coda, loop = products("embedding", "prelude", "loop"), products("embedding", "prelude")
    assert coda < loop < products("embedding") < products()


def test_partition_and_its_inverse():
    params = {"a": {"b": 1, "c": 2}, "d": 3}
    assert trained_part(params, frozenset({"a.b", "d"})) == {"a": {"c": 2}}
    assert with_part(params, {"a": {"c": 5}}) == {"a": {"b": 1, "c": 5}, "d": 3}


def test_a_gate_alone_is_a_case_of_frozen_parameters():
    gated = dataclasses.replace(GQA_LAST, exit_gate=True)
    config = config_with(gated, objectives=ObjectivesConfig(exit_loss="gain"), frozen=("embedding",))
    assert set(parameter_paths(config.model)) - frozen_paths(config) == select(gated, ["gate"], "")


def test_errors_name_the_field():
    for fields, message in [
        ({"frozen": ("q_prj",)}, r"^training\.frozen: got 'q_prj', allowed: .*; nearest: .*attention\.q"),
        ({"frozen": ("*",)}, r"^training\.frozen: got \['\*'\], allowed: names that leave something to train"),
        (
            {"frozen": ("gate",), "objectives": ObjectivesConfig(exit_loss="expected")},
            r"^training\.frozen: got \['gate'\], allowed: names that leave the gate to training\.objectives\.exit_loss",
        ),
        ({"learning_rate_factors": {"haed": 2.0}}, r"^training\.learning_rate_factors: got 'haed', .*nearest: head"),
        (
            {"frozen": ("loop",), "learning_rate_factors": {"injection": 2.0}},
            r"^training\.learning_rate_factors injection: got 2\.0, allowed: names of parameters that are not frozen",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            rate_factors(config_with(dataclasses.replace(DENSE, exit_gate="objectives" in fields), **fields))
    for factor in (0, -1.0):
        with pytest.raises(ConfigError, match=rf"^training\.learning_rate_factors head: got {factor}, .*number > 0$"):
            TrainingConfig(learning_rate_factors={"head": factor})


def test_bad_names_are_refused_before_anything_is_written(config, tmp_path):
    bad = dataclasses.replace(config, training=dataclasses.replace(config.training, frozen=("lop",)))
    with pytest.raises(ConfigError, match="nearest: loop"):
        train(bad, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_last_name_of_a_parameter_counts():
    factors = rate_factors(config_with(HUGINN, learning_rate_factors={"loop": 0.5, "norms": 2, "adapter": 3.0}))
    assert factors["recurrence.cell.layer_0.attention.q.kernel"] == 0.5
    assert factors["recurrence.cell.layer_0.attention_norm.scale"] == factors["final_norm.scale"] == 2
    assert factors["recurrence.cell.injection.adapter.kernel"] == 3
    assert "embedding" not in factors
    turned = rate_factors(config_with(HUGINN, learning_rate_factors={"adapter": 3.0, "norms": 2, "loop": 0.5}))
    assert set(turned) == set(factors)
    assert turned["recurrence.cell.injection.adapter.kernel"] == 0.5


def some_tree(config, seed):
    """Numbers in the shape of a model's parameters."""
    random = np.random.default_rng(seed)
    shapes = flat(weight_shapes(config)["params"])
    return unflatten_dict({path: np.float32(random.standard_normal(shape)) for path, shape in shapes.items()}, sep=".")


def test_adamw_with_factors_by_hand():
    """Three steps with weight decay: each group is as if it had its own learning rate."""
    training = TrainingConfig(steps=10, warmup_steps=1, gradient_clip=0.0, weight_decay=0.3)
    factors = rate_factors(config_with(PARCAE, learning_rate_factors={"loop": 0.5, "injection": 4, "embedding": 0.1}))
    optimizer = make_optimizer(training, factors)
    params, update = some_tree(PARCAE, 0), jax.jit(optimizer.update)
    state, rate = jax.jit(optimizer.init)(params), schedule(training, training.learning_rate)
    found, expected = params, {path: np.float64(leaf) for path, leaf in flat(params).items()}
    means, squares = dict.fromkeys(expected, 0.0), dict.fromkeys(expected, 0.0)
    for step in range(3):
        gradients = some_tree(PARCAE, step + 1)
        updates, state = update(gradients, state, found)
        found = jax.tree.map(np.add, found, updates)
        for path, gradient in flat(gradients).items():
            g = np.float64(gradient)
            means[path] = 0.9 * means[path] + 0.1 * g
            squares[path] = 0.95 * squares[path] + 0.05 * g**2
            m, v = means[path] / (1 - 0.9 ** (step + 1)), squares[path] / (1 - 0.95 ** (step + 1))
            decay = 0 if path.split(".")[-1] in ("scale", "log_a", "dt_bias", "b") else 0.3
            direction = m / (np.sqrt(v) + 1e-8) + decay * expected[path]
            expected[path] = expected[path] - factors.get(path, 1.0) * float(rate(step)) * direction
    for path, leaf in flat(found).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=2e-6, err_msg=path)
    # The state is that of a run without factors, so a resume may change them.
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(make_optimizer(training).init, params))


def newton_schulz(momentum):
    """Jordan's iteration in float64 NumPy."""
    x = momentum.T if momentum.shape[0] > momentum.shape[1] else momentum
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if momentum.shape[0] > momentum.shape[1] else x


@pytest.mark.parametrize("scaling", [False, True])
def test_muon_by_hand(scaling):
    """The first step: an orthogonal matrix of the gradient times the rate, a factor by name, and with
    `muon_shape_scaling` sqrt(outputs / inputs); AdamW for embedding, norms and head (arXiv 2511.07384)."""
    training = TrainingConfig(
        steps=10, warmup_steps=0, gradient_clip=0.0, weight_decay=0.1, optimizer="muon", muon_shape_scaling=scaling
    )
    params, gradients = some_tree(HUGINN, 0), some_tree(HUGINN, 1)
    factors = rate_factors(config_with(HUGINN, learning_rate_factors={"adapter": 3.0, "up": 0.5}))
    optimizer = make_optimizer(training, factors)
    step = jax.jit(lambda gradients, params: optimizer.update(gradients, optimizer.init(params), params)[0])
    updates = flat(step(gradients, params))
    gradients, params = flat(gradients), flat(params)
    cell = "recurrence.cell."
    for path, inputs, outputs, factor in [
        (cell + "injection.adapter.kernel", 64, 32, 3.0),
        (cell + "layer_0.feed_forward.up.kernel", 32, 40, 0.5),
        (cell + "layer_0.feed_forward.down.kernel", 40, 32, 1.0),
        ("prelude_0.attention.q.kernel", 32, 32, 1.0),
    ]:
        gradient, weight = (np.float64(tree[path]).reshape(inputs, outputs) for tree in (gradients, params))
        size = max(1, outputs / inputs) ** 0.5 if scaling else 1
        truth = -factor * 0.02 * (size * newton_schulz(gradient) + 0.1 * weight)
        np.testing.assert_allclose(updates[path].reshape(inputs, outputs), truth, rtol=0, atol=2e-6, err_msg=path)
    # AdamW's first step is the sign of the gradient; only matrices decay.
    for path, decay in [("embedding", 0.1), ("final_norm.scale", 0), (cell + "layer_0.attention.q_bias", 0)]:
        truth = -1e-3 * (np.sign(gradients[path]) + decay * params[path])
        np.testing.assert_allclose(updates[path], truth, rtol=0, atol=1e-6, err_msg=path)


def test_a_resume_may_change_factors_but_not_what_is_frozen():
    def metadata(**fields):
        config = config_with(DENSE, **fields)
        return {"model": to_dict(config.model), "training": to_dict(config.training), "data": {}}

    saved = metadata(frozen=("embedding",), learning_rate_factors={"loop": 0.5})
    check_resume(saved, metadata(frozen=("embedding",), learning_rate_factors={"loop": 2.0}), Path("run"))
    with pytest.raises(ConfigError, match=r"cannot resume, .*training\.frozen was \['embedding'\], is \[\]"):
        check_resume(saved, metadata(), Path("run"))
