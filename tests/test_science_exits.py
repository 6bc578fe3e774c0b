"""benchmarks.sweeps and benchmarks.science.exits: what a way to stop gives at equal mean loops."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sweeps
from benchmarks.science import exits, stopping
from benchmarks.sweeps import FIXED, Curve, Point
from mythos_jax.config import Config, DataConfig, MeshConfig, TaskConfig, load_config
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import make_mesh
from tests import tiny


def test_a_curve_is_that_of_the_full_forward_pass(monkeypatch):
    """A gate looks at the state alone: decoding token by token is the forward pass. Rows of three difficulties."""
    task = DataConfig(seq_len=8, held_out_fraction=0, task=TaskConfig(name="parity", difficulty=(3,)))
    variables, config, thresholds = tiny.variables(tiny.OURO), Config(model=tiny.OURO, data=task), np.array([0.3, 0.8])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loaded = LoadedModel(Path(), config, Mythos(tiny.OURO), variables, None, mesh, None)
    rows = sweeps.evaluation_rows(loaded, 4)
    assert rows["tokens"].shape == (12, 8)
    assert sweeps.criteria_of(loaded)[-1] == "gate"
    monkeypatch.setattr(sweeps, "CUMULATIVE", thresholds)
    ways = {FIXED: [(n, None) for n in (1, 2, 3)], "gate": [(3, Halting("gate", jnp.float32(q))) for q in thresholds]}
    for criterion, settings in ways.items():
        found = sweeps.curve(loaded, rows, 3, criterion)
        for j, (loops, policy) in enumerate(settings):
            out = tiny.run_traced(tiny.OURO, variables, rows["tokens"], jnp.int32(loops), halting=policy)
            log_p = np.asarray(jax.nn.log_softmax(out.logits))
            nats = -np.take_along_axis(log_p, rows["targets"][..., None], -1)[..., 0]
            for i in range(2):
                used, right = rows["mask"][i::2], log_p.argmax(-1) == rows["targets"]
                expected = [np.asarray(x)[i::2][used].mean() for x in (out.loops, nats, right)]
                np.testing.assert_allclose(found[i][j], expected, atol=1e-5)


def test_what_a_way_gives_between_two_thresholds():
    """Chosen on one half: two loops are half of the way between its points, one and three loops; reported on the
    other, also at the loops that those tokens have run."""
    curve = Curve([Point(3, 0, 0), Point(1, 9, 9)], [Point(3.2, 1.0, 0.75), Point(1.4, 2.0, 0.25)])
    assert curve.at(2.0) == pytest.approx((2.3, 1.5, 0.5))
    assert (curve.at(1.0), curve.at(3.0)) == (curve.report[1], curve.report[0])
    assert curve.at(0.9) is curve.at(3.1) is None
    fixed = Curve([], [Point(n, 2 / n, n / 4) for n in range(1, 4)])
    assert sweeps.fixed_at(fixed, 2.5) == pytest.approx((2.5, (1 + 2 / 3) / 2, 2.5 / 4))


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_models_differ_in_how_they_are_trained_alone(size):
    for problem in stopping.PROBLEMS.values():
        models = problem.models(size)
        configs = [load_config(problem.base, words) for _, words in models.values()]
        assert len({name for name, _ in models.values()}) == len(configs) == 5
        same = [(replace(c.model, exit_gate=False, readout="last"), c.data, c.training.steps) for c in configs]
        assert same == same[:1] * 5
        assert max(problem.budgets) < configs[0].model.loops
        second = stopping.second_stage(configs[0])
        assert (second.model.exit_gate, second.training.objectives.exit_loss) == (True, "gain")


def test_the_tables_of_exits(monkeypatch, tmp_path, capsys):
    """Instead of runs: fixed depths with a loss of 3 - loops / 10, gates that are better by 0.01, in the second stage
    by 0.02."""
    trained = []
    monkeypatch.setattr(stopping, "train", lambda config, path, **more: trained.append((path.name, more)))
    monkeypatch.setattr(stopping, "opened", lambda path, config: path)
    monkeypatch.setattr(stopping, "with_predictor", lambda path, depth: path)
    monkeypatch.setattr(stopping, "evaluation_rows", lambda path, rows: None)
    ways = {"gate": [FIXED, "kl", "gate"], "act": [FIXED, "act"]}
    monkeypatch.setattr(
        stopping,
        "criteria_of",
        lambda path: next((w for k, w in ways.items() if k in path.name.lower()), [FIXED, "kl"]),
    )

    def curve(path, rows, depth, way):
        gain = 0.02 * ("stage_2" in path.name) or 0.01 * (way == "gate")
        first = 2 if way == "kl" else 1
        points = [
            Point(n, 3 - n / 10 - gain + 0.1 * int(path.name.removesuffix("_stage_2")[-1]), 1 - 1 / n)
            for n in range(first, depth + 1)
        ]
        return Curve(points, points)

    monkeypatch.setattr(stopping, "curve", curve)
    words = ["--out", str(tmp_path), "--seeds", "0", "1"]
    exits.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert "| random depth | kl | 2 |  | 2.850 ± 0.071 | 2.800 ± 0.071 | 2.750 ± 0.071 |" in lines
    assert "| gate, uniform prior | gate, stage I | -0.010 (-0.010 to -0.010) | " in "\n".join(lines)
    assert sum(line.startswith("| gate, uniform prior | gate, stages I + II | -0.020") for line in lines) == 1
    assert sum("stage II alone" in line for line in lines) == 4
    assert len(trained) == 2 * 2 * (5 + 3)
    assert all(more["init_from"].name + "_stage_2" == name for name, more in trained if more)
    assert (tmp_path / "cpu" / "exits.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "cpu" / "exits.json").read_text())["text"]["loops"] == [1.5, 2, 2.5, 3]
    exits.main([*words, "--finished", "--problems", "group"])
    assert len(trained) == 2 * 2 * (5 + 3)


def test_the_table_of_a_run(monkeypatch, capsys):
    """Of a task: nats and right answers at the mean loops that are asked for."""
    points = [Point(n, 3 - n / 10, n / 8) for n in range(1, 5)]
    run = SimpleNamespace(
        config=SimpleNamespace(
            model=SimpleNamespace(loops=4, readout="act"), data=SimpleNamespace(task=SimpleNamespace(name="group"))
        )
    )
    monkeypatch.setattr(sweeps, "load_model", lambda path: run)
    monkeypatch.setattr(sweeps, "evaluation_rows", lambda loaded, rows: None)
    monkeypatch.setattr(
        sweeps, "curve", lambda loaded, rows, depth, way: Curve(points[way == "act" :], points[way == "act" :])
    )
    sweeps.main(["run", "--budgets", "1.5", "3", "6"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == [
        "| policy | 1.5 | 3.0 | all 4 |",
        "| fixed depth | 2.8500 | 2.7000 | 2.6000 |",
        "| act |  | 2.7000 | 2.6000 |",
        "| policy | 1.5 | 3.0 | all 4 |",
        "| fixed depth | 0.1875 | 0.3750 | 0.5000 |",
        "| act |  | 0.3750 | 0.5000 |",
    ]
