"""Which settings run, what halting saves, and rank correlations; against SciPy and numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.policies import SWEEPS, Setting, default_depths, make_settings
from mythos_jax.evaluation.ranks import binned_means, rank_correlation
from mythos_jax.evaluation.results import Evaluation, HeldOutText, Measurement, ModelInfo, ReasoningTask
from mythos_jax.model.halting import CRITERIA, Halting
from mythos_jax.report.pareto import Panel, make_panels, pool, savings

MODEL = ModelConfig(vocab_size=8, dim=8, max_seq_len=8, n_heads=1, n_kv_heads=1)
INFO = ModelInfo("tiny", None, None, 4, 100)


@pytest.mark.parametrize(("trained", "depths"), [(1, [1, 2]), (6, [1, 2, 4, 6, 8]), (8, [1, 2, 4, 8, 16])])
def test_default_depths(trained, depths):
    assert default_depths(trained) == depths


def test_policies_follow_the_depths_and_may_sweep():
    settings = make_settings(MODEL, [4, 1, 4], [Halting("latent", 0.2), Halting("latent")])
    assert [(s.loops, s.criterion) for s in settings[:2]] == [(1, None), (4, None)]
    assert {s.loops for s in settings[2:]} == {4}
    thresholds = [s.threshold for s in settings[2:]]
    assert thresholds[0] == 0.2
    assert sorted(thresholds) == sorted(SWEEPS["latent"])  # 0.2 is in the sweep, and runs once
    with pytest.raises(ConfigError, match="allowed with readout last"):
        make_settings(MODEL, [1], [Halting("act")])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_has_a_sweep(criterion):
    sweep = SWEEPS[criterion]
    assert len(set(sweep)) == len(sweep) >= 5


def test_rank_correlation_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=500), rng.integers(0, 4, 500)
    y = y + (x > 0)
    assert rank_correlation(x, y) == spearmanr(x, y).statistic
    # 1 - 6 sum(d²) / (n (n² - 1)) holds without ties; with them, Pearson's correlation of mean ranks does.
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([10, 30, 20, 40])) == pytest.approx(1 - 6 * 2 / 60)
    by_hand = np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1]
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([5, 5, 7, 9])) == pytest.approx(by_hand)
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([1.0, 2.0, 3.0], [4, 4, 4]),
        ([4, 4, 4], [1.0, 2.0, 3.0]),
        ([1.0, np.nan, 3.0], [1, 2, 3]),
    ],
)
def test_undefined_rank_correlations_are_none(x, y):
    assert rank_correlation(np.array(x), np.array(y)) is None


def test_bins_hold_equally_many_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=500), rng.integers(0, 4, 500)
    mean_x, mean_y = binned_means(x, y, 5)
    assert np.all(np.diff(mean_x) > 0)
    assert mean_y[0] == y[np.argsort(x)[:100]].mean()


def measurement(loops, value, mean_loops=None, halting=None, higher_is_better=False, metric="x", **fields):
    mean_loops = loops if mean_loops is None else mean_loops
    return Measurement(Setting(loops, halting), metric, value, higher_is_better, mean_loops, 9, **fields)


def panel(higher_is_better, fixed, halted):
    points = [measurement(loops, value, higher_is_better=higher_is_better) for loops, value in fixed]
    points += [
        measurement(8, value, mean, Halting("latent", threshold), higher_is_better) for threshold, mean, value in halted
    ]
    return Panel("x", "", higher_is_better, tuple(points))


def test_savings_are_those_of_the_cheapest_setting_that_keeps_the_quality():
    losses = panel(False, [(1, 3.0), (2, 2.0), (4, 1.002), (8, 1.0)], [(0.1, 6, 0.999), (0.3, 3, 1.004), (0.5, 2, 1.9)])
    cheapest = savings(losses, trained_loops=8)
    assert cheapest[None].point.setting.loops == 4
    assert cheapest[None].saved == 0.5
    assert cheapest["latent"].point.setting.threshold == 0.3
    assert cheapest["latent"].saved == pytest.approx(1 - 3 / 8)
    assert cheapest["latent"].over_fixed == pytest.approx(1.004 - (2.0 + 1.002) / 2)
    accuracies = panel(True, [(1, 20.0), (8, 100.0)], [(0.1, 4, 99.0)])
    cheapest = savings(accuracies, trained_loops=6)  # not measured: relative to the deepest instead
    assert cheapest[None].saved == 0
    assert cheapest["latent"] is None


def test_panels_hold_comparable_measurements():
    halted = measurement(4, 1.05, 2.5, Halting("latent", 0.1))
    text = Evaluation(INFO, HeldOutText("data", 8), [measurement(1, 1.5), measurement(4, 1.0), halted])
    (one,) = make_panels(text)
    assert [p.value for p in one.fixed] == [1.5, 1.0]
    assert [p.mean_loops for p in one.policies["latent"]] == [2.5]
    worse = tuple(replace(p, mean_loops=p.mean_loops + 1, value=p.value + 1) for p in one.points)
    both = pool([one, replace(one, points=worse)], "both")
    assert [p.value for p in both.fixed] == [2.0, 1.5]
    assert both.policies["latent"][0].mean_loops == 3.0


def test_problems_have_a_panel_per_difficulty():
    measurements = [
        replace(
            measurement(loops, loops * difficulty / 8, group=difficulty, higher_is_better=True), metric="exact_match"
        )
        for difficulty in (1, 2)
        for loops in (1, 4)
    ]
    easy, hard = make_panels(Evaluation(INFO, ReasoningTask("addition", [1]), measurements))
    assert (easy.metric, easy.group, easy.trained_on) == ("exact match, %", "difficulty 1", True)
    assert (hard.group, hard.trained_on) == ("difficulty 2", False)
    assert [p.value for p in hard.fixed] == [25.0, 100.0]
