"""benchmarks.quickstart: variants at equal training FLOPs, and paired differences between them."""

import pytest

from benchmarks import quickstart
from mythos_jax.config import Config
from mythos_jax.flops import training_flops


def test_variants_cost_the_same_and_are_compared_seed_by_seed(monkeypatch, tmp_path, capsys):
    asked: list[Config] = []

    def train(config, workdir):
        asked.append(config)
        worse = 0.25 * (config.training.optimizer == "adamw")
        return {str(depth): 2 + config.training.seed + worse + (depth != 3) for depth in quickstart.DEPTHS}

    monkeypatch.setattr(quickstart, "train_and_evaluate", train)
    monkeypatch.setattr("sys.argv", ["quickstart", "--out", str(tmp_path), "--seeds", "0", "1"])
    quickstart.main()
    lines = capsys.readouterr().out.splitlines()
    other = "3.500 ± 0.707"
    assert f"| quickstart | 2 | {other} | {other} | **2.500 ± 0.707** | {other} | {other} |" in lines
    assert "| AdamW, learning rate 2e-3 | +0.250, +0.250 | +0.250 |" in lines
    assert "| mean depth 4 | +0.000, +0.000 | +0.000 |" in lines
    assert len(asked) == 2 * len(quickstart.VARIANTS)
    costs = [config.training.steps * training_flops(config) for config in asked]
    assert costs == pytest.approx([costs[0]] * len(costs), rel=0.005)
    quickstart.main()  # repeats nothing
    assert len(asked) == 2 * len(quickstart.VARIANTS)
