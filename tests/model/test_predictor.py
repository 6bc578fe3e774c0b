"""Halting by prediction: in a full forward pass, with a cache, and when it is refused."""

import jax
import numpy as np
import pytest

from mythos_jax.model.halting import Halting
from mythos_jax.model.predictor import PRICES, init_head, predicted_loops
from tests.model.test_cache import CUTS, LENGTHS, LOOPS, run_in_pieces
from tests.tiny import GQA, MLA, halting, run, some_tokens, variables

DEPTHS = 4  # the predictor predicts fewer loops than the call allows


def predictor(config):
    """Random, so that tokens differ; with invented mean loops, so that the budget determines the price."""
    head = jax.tree.map(np.asarray, init_head(jax.random.key(3), config.dim, 16, DEPTHS))
    head["out"] = np.random.default_rng(0).standard_normal(head["out"].shape).astype(np.float32)
    mean_loops = np.linspace(DEPTHS, 1, len(PRICES)).astype(np.float32)
    return {**head, "prices": PRICES, "mean_loops": mean_loops, "budget": np.float32(2)}


def with_predictor(config):
    return {**variables(config), "predictor": predictor(config)}


@pytest.mark.parametrize("budget", [1.6, 4.0])
def test_tokens_run_the_predicted_loops_also_when_decoding(budget, monkeypatch):
    weights, policy = with_predictor(MLA), halting("predicted", budget)
    full = run(MLA, weights, some_tokens(), loops=LOOPS, halting=policy)
    expected = predicted_loops(weights["predictor"], full.aux.injected_BTD, budget)
    np.testing.assert_array_equal(full.loops, expected)
    assert len(np.unique(full.loops)) >= (3 if budget < DEPTHS else 1)
    monkeypatch.setattr("tests.model.test_cache.variables", with_predictor)
    logits, ran, _ = run_in_pieces(MLA, some_tokens(), CUTS["chunk_then_tokens"], halting=policy)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(ran[b, :length], full.loops[b, :length])
        np.testing.assert_allclose(logits[b, :length], full.logits[b, :length], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (GQA, with_predictor, "halting criterion: got 'predicted', allowed with readout act: act"),
        (MLA, variables, "halting criterion: got 'predicted' for weights without a predictor; `mythos train-pr"),
    ],
)
def test_refusals(config, weights, message):
    with pytest.raises(ValueError, match=message):
        run(config, weights(config), some_tokens(), loops=LOOPS, halting=Halting("predicted"))


def test_budget_below_one_loop_is_refused():
    with pytest.raises(ValueError, match=r"halting threshold: got 0.5, allowed: a number >= 1"):
        Halting("predicted", 0.5)
