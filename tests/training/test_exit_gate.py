"""Training an exit gate: both stages of Ouro against the NumPy reference, and what a run changes."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config import ObjectivesConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.likelihood import exit_losses, forward
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import Aux
from mythos_jax.runs.load import load_model
from mythos_jax.training.depth import truncated_forward
from mythos_jax.training.objectives import exit_objective, token_mean, total_weight
from mythos_jax.training.train import train
from tests import reference
from tests.tiny import GQA_LAST, OURO, TRAINED, exact, some_tokens, variables
from tests.training.test_step import RANDOM, config_with, run

GATED = dataclasses.replace(GQA_LAST, exit_gate=True)  # with a prelude and a coda
EXPECTED = ObjectivesConfig(exit_loss="expected", exit_entropy=0.3)
GEOMETRIC = dataclasses.replace(EXPECTED, exit_prior_rate=0.4)
GAIN = ObjectivesConfig(exit_loss="gain", exit_gain=0.1, exit_slope=5.0)


def mean_over(mask):
    mask = jnp.asarray(mask)
    return token_mean(mask, total_weight(mask))


def formula(config, losses_L, gates_L):
    """One token's objective, from its loss and its gate's probability after each loop, as the paper writes it."""
    survival, total, L = 1.0, 0.0, len(losses_L)
    prior = (1 - config.exit_prior_rate) ** np.arange(L)
    if config.exit_prior_rate:  # of the uniform one, the constant is left out
        prior /= prior.sum()
    for t in range(L):
        if config.exit_loss == "expected":
            p = survival if t == L - 1 else survival * gates_L[t]
            survival *= 1 - gates_L[t]
            total += p * losses_L[t] + config.exit_entropy * p * np.log(p / prior[t])
        elif t > 0:
            gain = max(0, losses_L[t - 1] - losses_L[t])
            w = 1 / (1 + np.exp(-config.exit_slope * (gain - config.exit_gain)))
            total -= (w * np.log(1 - gates_L[t]) + (1 - w) * np.log(gates_L[t])) / L
    return total


@pytest.mark.parametrize("config", [EXPECTED, GEOMETRIC, GAIN], ids=["expected", "geometric", "gain"])
def test_objectives_are_the_formulas_of_the_paper(config):
    """Tokens that have run 1 to 4 of 4 traced loops, also with a gate that is sure of itself; and the metrics."""
    random = np.random.default_rng(0)
    losses, logits = random.gamma(2.0, size=(4, 2, 4)), 3 * random.standard_normal((4, 2, 4))
    loops, mask = np.array([[1, 2, 3, 4], [4, 4, 6, 9]]), np.array([[1, 1, 1, 1], [1, 0, 1, 1]], bool)
    aux = Aux(*[None] * 8)
    aux = aux.replace(halt_logit_LBT=jnp.asarray(logits, jnp.float32))
    found = exit_objective(config, jnp.asarray(losses, jnp.float32), aux, jnp.asarray(loops), mean_over(mask))
    gates, exits = 1 / (1 + np.exp(-logits)), []
    for b, t in np.ndindex(2, 4):
        n = min(loops[b, t], 4)
        truth = formula(config, losses[:n, b, t], gates[:n, b, t])
        np.testing.assert_allclose(found.minimised_BT[b, t], truth, rtol=0, atol=1e-5)
        p = gates[:n, b, t] * np.cumprod(np.append(1, 1 - gates[: n - 1, b, t]))
        p[-1] = 1 - p[:-1].sum()
        nats = losses[n - 1, b, t] if config is GAIN else p @ losses[:n, b, t]
        np.testing.assert_allclose(found.nats_BT[b, t], nats, rtol=0, atol=1e-5)
        exits += [p @ np.arange(loops[b, t] - n + 1, loops[b, t] + 1)] if mask[b, t] else []
    np.testing.assert_allclose(found.metrics["mean_exit"], np.mean(exits), rtol=1e-5)
    sure = aux.replace(halt_logit_LBT=jnp.full((4, 2, 4), 60.0))
    slope = jax.grad(
        lambda x: exit_objective(config, losses, sure.replace(halt_logit_LBT=x), loops, mean_over(mask))[0].sum()
    )
    assert np.isfinite(slope(sure.halt_logit_LBT)).all()


T = 8
MASK = np.ones((2, T), bool)
MASK[1, 6:] = False


def some_batch():
    """Two documents in each row."""
    tokens = some_tokens(3, (2, T + 1))
    segments = np.where(MASK, 1 + (np.arange(T) >= 3), 0).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": MASK, "segment_ids": segments}


def truth(params, base, config, batch, objectives, depths, traced):
    """The objective in float64, document by document. With truncated backpropagation the state before the last loops is
    that of the parameters `base`, which a derivative leaves alone."""
    total = 0.0
    for b, depth in enumerate(depths):
        for segment in (1, 2):
            (places,) = np.nonzero(batch["segment_ids"][b] == segment)
            tokens, targets = batch["tokens"][b, places], batch["targets"][b, places]
            first, state, run = max(depth - traced, 0), None, config
            if first:
                state = reference.forward(config, {"params": base}, tokens, first).states[-1]
                run = dataclasses.replace(config, initial_state="zeros")
            exits = [
                reference.forward(run, {"params": params}, tokens, t + 1, initial_state=state)
                for t in range(depth - first)
            ]
            logits = np.array([exit.logits for exit in exits])
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses = -log_p[:, np.arange(len(places)), targets]
            total += sum(formula(objectives, losses[:, i], exits[-1].probabilities[:, i]) for i in range(len(places)))
    return total / batch["mask"].sum()


# The model, the objective, the depth of each row, and how many last loops have gradients.
CASES = {
    "ouro": (OURO, EXPECTED, (3, 3), 3),
    "coda": (GATED, EXPECTED, (3, 3), 3),
    "truncated": (OURO, EXPECTED, (4, 1), 2),
    "gain": (GATED, GAIN, (3, 3), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_objective_and_gradient_of_a_model(case):
    """The objective, and its derivatives in random directions, which the reference finds by finite differences."""
    config, objectives, depths, traced = CASES[case]
    model, params, batch = Mythos(config), variables(config)["params"], some_batch()
    loops, run = depths[0], partial(forward, trace_states=True)
    if len(set(depths)) > 1:
        loops, run = jnp.array(depths), partial(truncated_forward, backprop_loops=traced, trace_states=True)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        loss_LBT, out = exit_losses(model, {"params": params}, batch, loops=loops, run=run)
        losses = exit_objective(objectives, loss_LBT, out.aux, out.loops, mean_over(batch["mask"]))
        return (losses.minimised_BT * batch["mask"]).sum() / batch["mask"].sum()

    value, gradient = ours(params)
    base = exact(params)
    arguments = base, config, batch, objectives, depths, traced
    assert abs(value - truth(base, *arguments)) <= 1e-5
    for seed in range(3):
        random = np.random.default_rng(seed)
        direction = jax.tree.map(lambda x: random.standard_normal(x.shape), base)  # noqa: B023
        if objectives is GAIN:  # the labels have no gradient, and depend on everything but the gate
            direction = jax.tree_util.tree_map_with_path(lambda path, x: x * ("halt" in path[-1].key), direction)
        size = np.sqrt(sum((d**2).sum() for d in jax.tree.leaves(direction)))
        along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction))) / size
        ahead, behind = (jax.tree.map(lambda x, d: x + step / size * d, base, direction) for step in (1e-4, -1e-4))  # noqa: B023
        assert abs(along - (truth(ahead, *arguments) - truth(behind, *arguments)) / 2e-4) <= 1e-5


def test_logits_of_all_loops_never_exist_together():
    """Neither in the forward pass nor among what the backward pass keeps."""
    config = dataclasses.replace(GATED, vocab_size=56)  # a number that no other array has
    run = partial(forward, trace_states=True)

    def total(params):
        return exit_losses(Mythos(config), {"params": params}, some_batch(), loops=3, run=run)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(total))(variables(config)["params"]))
    assert f"[{2 * T},56]" in program
    assert f"[3,2,{T},{config.dim}]" in program
    assert not re.search(r"\[3,[\d,]*,56\]", program)


def test_parts_and_devices_do_not_matter():
    """Rows of random depths, with gradients through the last loops."""
    model = dataclasses.replace(RANDOM.model, exit_gate=True, feed_forward="dense")
    whole = dataclasses.replace(RANDOM, model=model, training=dataclasses.replace(RANDOM.training, objectives=EXPECTED))
    parts = dataclasses.replace(whole, training=dataclasses.replace(whole.training, grad_accumulation_steps=2))
    for a, b in zip(run(whole, 2)[1], run(parts, 2, devices=4)[1], strict=True):
        for name in ["loss", "gradient_norm", "mean_loops"]:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)
        assert 0 < a["exit_entropy"] < np.log(2)
        assert 1 < a["mean_exit"] < a["mean_loops"]


def test_gain_changes_the_gate_and_nothing_else():
    """Weights, their average and the router's biases keep their bits, in spite of Muon, of weight decay and of load."""
    gated = dataclasses.replace(TRAINED, exit_gate=True)
    config = config_with(gated, objectives=GAIN, optimizer="muon", ema_decay=0.9, warmup_steps=0, learning_rate=1e-2)
    states, metrics = run(config, 3)
    before, after = ({"average": s.average, **s.variables} for s in (states[0], states[-1]))

    def compare(path, old, new):
        assert (old.tobytes() == new.tobytes()) == (path[-1].key not in ("halt_kernel", "halt_bias")), path

    jax.tree_util.tree_map_with_path(compare, before, after)
    moments = sum(x.size for x in jax.tree.leaves(states[0].optimizer) if x.ndim)
    assert 2 * (gated.dim + 1) <= moments < 4 * gated.dim  # of the gate alone
    assert metrics[-1]["exit_loss"] < metrics[0]["exit_loss"]
    assert metrics[0]["loss"] > 3


def test_a_gate_for_a_run_that_has_none(config, uninterrupted, tmp_path, capsys):
    source = load_model(uninterrupted)
    other = dataclasses.replace(TRAINED, exit_gate=True, loops=3)
    alone = dataclasses.replace(config.training, steps=2, warmup_steps=0, objectives=GAIN, ema_decay=0.5)
    gated = dataclasses.replace(config, model=other, training=alone)
    train(gated, tmp_path / "gated", progress=False, init_from=uninterrupted)
    lines = capsys.readouterr().err
    assert f"{uninterrupted}: has no exit gate; the run starts with a new one\n" in lines
    assert f"model.loops is 2 in {uninterrupted}, 3 in this run\n" in lines
    found = load_model(tmp_path / "gated")
    cell = dict(found.variables["params"]["recurrence"]["cell"])
    assert np.abs(cell.pop("halt_kernel")).max() > 0
    assert np.abs(cell.pop("halt_bias")).max() > 0
    assert found.variables["params"].keys() == source.variables["params"].keys()
    rest = {**found.variables["params"], "recurrence": {"cell": cell}}
    jax.tree.map(np.testing.assert_array_equal, rest, source.variables["params"])
    jax.tree.map(np.testing.assert_array_equal, found.variables["balance"], source.variables["balance"])
    together = dataclasses.replace(gated, training=dataclasses.replace(alone, objectives=EXPECTED))
    with pytest.raises(ConfigError, match=r"training\.objectives\.exit_loss was 'gain', is 'expected'"):
        train(together, tmp_path / "gated", progress=False)
    config = dataclasses.replace(config, model=dataclasses.replace(TRAINED, loops=3))
    with pytest.raises(ConfigError, match=r"do not fit this config \(model\.exit_gate is True, not False\)"):
        train(config, tmp_path / "without", progress=False, init_from=tmp_path / "gated")
