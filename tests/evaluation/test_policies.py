"""What runs, what it saves, and ranks; against scipy and numbers made by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.policies import SWEEPS, default_depths, settings
from mythos_jax.evaluation.ranks import by_parts, rank_correlation
from mythos_jax.evaluation.results import DepthResult
from mythos_jax.model.halting import CRITERIA, Halting
from mythos_jax.report.pareto import Panel, Point, panels, pooled, savings

MODEL = ModelConfig(vocab_size=8, dim=8, max_seq_len=8, n_heads=1, n_kv_heads=1)


@pytest.mark.parametrize(("trained", "depths"), [(1, [1, 2]), (6, [1, 2, 4, 6, 8]), (8, [1, 2, 4, 8, 16])])
def test_default_depths(trained, depths):
    assert default_depths(trained) == depths


def test_policies_follow_the_depths_and_may_sweep():
    found = settings(MODEL, [4, 1, 4], [Halting("latent", 0.2), Halting("latent")])
    assert [(s.loops, s.criterion) for s in found[:2]] == [(1, None), (4, None)]
    assert {s.loops for s in found[2:]} == {4}
    thresholds = [s.threshold for s in found[2:]]
    assert thresholds[0] == 0.2
    assert sorted(thresholds) == sorted(SWEEPS["latent"])  # 0.2 is in the sweep, and runs once
    with pytest.raises(ConfigError, match="allowed with readout last"):
        settings(MODEL, [1], [Halting("act")])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_has_a_sweep(criterion):
    sweep = SWEEPS[criterion]
    assert len(set(sweep)) == len(sweep) >= 5


def test_ranks_agree_with_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=500), rng.integers(0, 4, 500)
    y = y + (x > 0)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert rank_correlation(x, np.full(500, 3)) is None
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    means, of_y = by_parts(x, y, 5)
    assert np.all(np.diff(means) > 0)
    assert of_y[0] == y[np.argsort(x)[:100]].mean()


def panel(higher, fixed, halted):
    points = [Point(n, None, None, False, n, value) for n, value in fixed]
    points += [Point(8, "latent", t, False, mean, value) for t, mean, value in halted]
    return Panel("x", "", higher, tuple(points))


def test_savings_are_of_the_cheapest_that_keeps_the_loss():
    losses = panel(False, [(1, 3.0), (2, 2.0), (4, 1.002), (8, 1.0)], [(0.1, 6, 0.999), (0.3, 3, 1.004), (0.5, 2, 1.9)])
    found = savings(losses, trained=8)
    assert found[None].point.loops == 4
    assert found[None].saved == 0.5
    assert found["latent"].point.threshold == 0.3
    assert found["latent"].saved == pytest.approx(1 - 3 / 8)
    assert found["latent"].over_fixed == pytest.approx(1.004 - (2.0 + 1.002) / 2)
    rights = panel(True, [(1, 20.0), (8, 100.0)], [(0.1, 4, 99.0)])
    found = savings(rights, trained=6)  # not measured: the deepest stands for it
    assert found[None].saved == 0
    assert found["latent"] is None


def test_results_that_compare_stand_together():
    results = [DepthResult(n, loss, loss / 2, mean, 9, h, t) for n, loss, mean, h, t in
               [(1, 3.0, 1.0, None, None), (4, 2.0, 4.0, None, None), (4, 2.1, 2.5, "latent", 0.1)]]  # fmt: skip
    (one,) = panels(results)
    assert [p.value for p in one.fixed] == [1.5, 1.0]
    assert [p.mean_loops for p in one.policies["latent"]] == [2.5]
    worse = tuple(replace(p, mean_loops=p.mean_loops + 1, value=p.value + 1) for p in one.points)
    both = pooled([one, replace(one, points=worse)], "both")
    assert [p.value for p in both.fixed] == [2.0, 1.5]
    assert both.policies["latent"][0].mean_loops == 3.0
