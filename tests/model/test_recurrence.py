"""The recurrent block against the NumPy reference: scan, while loop, depth per row, gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model.mythos import Mythos
from tests import reference
from tests.tiny import (
    GQA,
    GQA_LAST,
    HUGINN,
    MLA,
    MLA_ACT,
    OURO,
    PARCAE,
    RAVEN,
    B,
    V,
    exact,
    run,
    run_traced,
    some_state,
    some_tokens,
    traces,
    variables,
)

FAMILIES = {
    "openmythos": GQA,  # remainder, MoE, LoRA
    "openmythos_mla": MLA_ACT,  # the original's read-out: no remainder
    "gqa_last": GQA_LAST,
    "mla_last": MLA,
    "huginn": HUGINN,
    "parcae": PARCAE,
    "ouro": OURO,
    "raven": RAVEN,
}
LOOPS = 5  # more than the trained depth, 3


def truth(config, loops, row, tokens=None, state=None):
    tokens = some_tokens() if tokens is None else tokens
    state = some_state(config)
    state = None if state is None else state[row].astype(np.float64)
    return reference.forward(config, exact(variables(config)), tokens[row], loops, initial_state=state)


@pytest.mark.parametrize("family", FAMILIES)
def test_scan_equals_reference(family):
    config = FAMILIES[family]
    out = run(config, variables(config), some_tokens(), loops=LOOPS, initial_state=some_state(config))
    rows = [truth(config, LOOPS, b) for b in range(B)]
    assert out.logits.dtype == jnp.float32
    for b, row in enumerate(rows):
        np.testing.assert_allclose(out.logits[b], row.logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(out.state[b], row.state, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(out.loops[b], row.loops)
        np.testing.assert_allclose(out.aux.change_LBT[:, b], row.changes, rtol=1e-3, atol=1e-5)
        if config.readout == "act" or config.exit_gate:
            np.testing.assert_allclose(out.aux.halt_probability_LBT[:, b], row.probabilities, rtol=0, atol=1e-5)
        if config.readout == "act":
            np.testing.assert_allclose(out.aux.act_weight_LBT[:, b], row.weights, rtol=0, atol=1e-5)
            total_T = np.sum(out.aux.act_weight_LBT[:, b], axis=0)
            reached_T = (row.probabilities * ~row.halted).sum(0) >= config.act_threshold
            complete_T = reached_T | config.act_remainder
            np.testing.assert_allclose(total_T[complete_T], 1, rtol=0, atol=1e-5)
            assert (total_T[~complete_T] < 1).all()
    if config.feed_forward == "moe":
        np.testing.assert_array_equal(out.aux.expert_load, sum(row.load for row in rows))


@pytest.mark.parametrize("family", ["openmythos", "mla_last"])
def test_traced_depth_equals_scan_and_compiles_once(family):
    config = FAMILIES[family]
    before = traces[config]
    for loops in (1, 2, LOOPS, 7):
        out = run_traced(config, variables(config), some_tokens(), jnp.int32(loops), initial_state=None)
        for b in range(B):
            np.testing.assert_allclose(out.logits[b], truth(config, loops, b).logits, rtol=0, atol=1e-4)
        if loops == LOOPS:
            scanned = run(config, variables(config), some_tokens(), loops=LOOPS, initial_state=None)
            np.testing.assert_allclose(out.logits, scanned.logits, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(out.loops, scanned.loops)
    assert traces[config] - before == 1


@pytest.mark.parametrize("family", ["openmythos", "huginn"])
def test_rows_of_different_depths_equal_rows_on_their_own(family):
    config, depths = FAMILIES[family], np.array([2, 5], np.int32)
    out = run_traced(config, variables(config), some_tokens(), depths, initial_state=some_state(config))
    rows = [truth(config, int(depth), b) for b, depth in enumerate(depths)]
    for b, row in enumerate(rows):
        np.testing.assert_allclose(out.logits[b], row.logits, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(out.loops[b], row.loops)
    if config.feed_forward == "moe":  # loops beyond a row's depth do not count
        np.testing.assert_array_equal(out.aux.expert_load, sum(row.load for row in rows))


@pytest.mark.parametrize("config", [GQA, replace(MLA, prelude_layers=0)], ids=["openmythos", "mla_last"])
def test_gradient_equals_finite_differences_of_reference(config):
    """One random direction per parameter array; the reference is unrolled and in float64."""
    random = np.random.default_rng(1)
    weight_TV = random.standard_normal((5, V)) / 5
    point = exact(variables(config))

    def loss_of(params):
        out = Mythos(config).apply({**variables(config), "params": params}, some_tokens()[:1, :5], loops=LOOPS)
        return (out.logits[0] * weight_TV).sum()

    gradients = jax.jit(jax.grad(loss_of))(variables(config)["params"])

    def loss(params):
        moved = reference.forward(config, {**point, "params": params}, some_tokens()[0, :5], LOOPS)
        return (moved.logits * weight_TV).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        step = 1e-6 * random.standard_normal(leaf.shape)

        def moved(sign, path=path, step=step):
            return jax.tree_util.tree_map_with_path(lambda p, x: x + sign * step if p == path else x, point["params"])

        expected = (loss(moved(1)) - loss(moved(-1))) / 2
        # The typical size of the product of this gradient and a random step.
        scale = np.linalg.norm(leaf) * np.linalg.norm(step) / np.sqrt(leaf.size)
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        assert scale > 0, name
        assert abs((leaf * step).sum() - expected) <= 1e-3 * scale + 1e-12, name


def test_loops_below_one_are_refused():
    with pytest.raises(ValueError, match=r"loops: got 0, allowed: an integer >= 1"):
        run(GQA, variables(GQA), some_tokens(), loops=0)
