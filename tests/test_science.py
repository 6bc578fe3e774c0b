"""The scripts of benchmarks/science: what they compute from losses and times, and each from its words to its files."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks.halting import Point
from benchmarks.science import cache, frame, latency, parameters, rates, sampled_depth
from benchmarks.science.decoding import Side
from benchmarks.science.frame import SIZES, Arm, interval
from benchmarks.science.parameters import LOOPED, PLAIN, cost_at, fitted_phi
from benchmarks.science.sampled_depth import FIXED, SAMPLED
from mythos_jax.config import Config, DataConfig, MeshConfig
from mythos_jax.flops import forward_flops
from mythos_jax.inference.speculative import SpeculativeResult
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import make_mesh
from tests import tiny

ARMS = {
    cache.SHARED,
    *PLAIN,
    *LOOPED,
    *sampled_depth.ARMS,
    *(rates.at(kind, rate) for kind in rates.KINDS for rate in rates.RATES),
}
PHI = 0.46


def law(arm: Arm, seed: int = 0) -> float:
    """A loss that falls with the width and with the logarithm of the layers, of which a loop is worth r^PHI."""
    layers = 2 + arm.core * arm.loops**PHI if arm.loops else arm.core
    return 3 - 0.2 * np.log(layers) - 0.3 * np.log(arm.width) + 0.01 * seed


@pytest.fixture
def trained(monkeypatch):
    """In place of training: the loss of the law at every depth. Returns the configs that were asked for."""
    asked = []

    def train(config: Config, workdir: Path) -> frame.Losses:
        asked.append(config)
        size = "cpu" if "/cpu/" in str(workdir) else "gpu"
        arm = next(
            a for a in ARMS if str(workdir) == f"{workdir.parent}/{frame.file_name(a.name(size))}_{workdir.name[-1]}"
        )
        count = config.model.dim**2 * config.model.loop_layers * (1 + arm.experts)
        costs = {"parameters": count + config.model.dim * 264, "non_embedding": count, "training_flops": 7.0 * count}
        return {**{str(n): law(arm, config.training.seed) for n in config.evaluation.loops}, **costs}

    monkeypatch.setattr(frame, "train_and_account", train)
    return asked


@pytest.mark.parametrize("size", SIZES)
def test_all_models_of_a_size_see_the_same_batches(size):
    configs = [arm.config(size) for arm in ARMS]
    assert len({arm.name(size) for arm in ARMS}) == len(ARMS)
    assert len({(c.data, c.training.steps, c.training.batch_size, c.training.optimizer) for c in configs}) == 1
    context = configs[0].data.seq_len // 2
    dense, experts = (forward_flops(Arm(4, 1, 4, e).config(size).model, context).at(4) for e in (0, 4))
    assert experts == pytest.approx(dense, rel=0.02)  # the router


def test_phi_and_the_ratio_of_a_known_law():
    plain = {layers: law(Arm(4, layers)) for layers in (2, 3, 8)}
    looped = [(arm, law(arm)) for arm in (Arm(4, 1, 2), Arm(4, 1, 8), Arm(4, 2, 4))]
    assert fitted_phi(plain, looped) == pytest.approx(PHI, abs=0.001)
    sizes = np.array([4e5, 1e5, 2e5, 3e5])
    losses = 5 - 0.1 * np.log(sizes)
    losses[3] += 1  # dearer and worse than another one: no part of the frontier
    assert cost_at(5 - 0.1 * np.log(1.7e5), sizes, losses) == pytest.approx(1.7e5)
    assert cost_at(5 - 0.1 * np.log(3.3e5), sizes, losses) == pytest.approx(3.3e5)
    assert [cost_at(loss, sizes, losses) for loss in (9.0, 0.0)] == pytest.approx([1e5, 4e5])


def test_an_interval_resamples_seeds_together():
    values = np.array([1.0, 2.0, 6.0])
    assert interval(3, lambda seeds: values[seeds].mean()) == pytest.approx((3.0, 1.0 + 7 / 60, 6.0 - 13 / 15), abs=0.3)
    assert interval(3, lambda seeds: (values[seeds] - values[seeds]).mean()) == (0, 0, 0)
    assert frame.bracket(interval(1, lambda seeds: values[seeds].mean())) == "1.00"


def test_the_tables_of_parameters_and_rates(trained, tmp_path, capsys):
    parameters.main(["--out", str(tmp_path), "--seeds", "0", "1"])
    printed = capsys.readouterr().out
    assert f"phi: {PHI:.2f} ({PHI:.2f} to {PHI:.2f}), 2 seeds" in printed
    assert len(trained) == 2 * (len(PLAIN) + len(LOOPED))
    row = next(line for line in printed.splitlines() if line.startswith("| plain 64, 4 layers"))
    assert row.split(" | ")[1:4] == ["4", "1.638e+04", "3.328e+04"]
    assert row.endswith(f"| {law(Arm(4, 4)) + 0.005:.3f} ± 0.007 |")
    rates.main(["--out", str(tmp_path), "--seeds", "0"])
    assert f"| looped 64, 1 + 1 x 4 + 1 layers | {law(FIXED):.3f} | " in capsys.readouterr().out
    assert len(trained) == 2 * (len(PLAIN) + len(LOOPED)) + 3 * (len(rates.RATES) - 1)  # the others were finished
    for name in "parameters", "rates":
        assert (tmp_path / "cpu" / f"{name}.png").stat().st_size > 10_000
        assert json.loads((tmp_path / "cpu" / f"{name}.json").read_text())


def test_the_table_of_sampled_depth(trained, monkeypatch, tmp_path, capsys):
    steps = []
    monkeypatch.setattr(sampled_depth, "train_step", lambda config: partial(steps.append, config))
    sampled_depth.main(["--out", str(tmp_path), "--seeds", "0", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[1:6] == ["2", "4", "8", "16", "spread"]
    assert "| 0.000 ± 0.000 | 0.000 ± 0.000 |" in lines[2]
    assert len(steps) == len(sampled_depth.ARMS) * (1 + 3 * sampled_depth.STEPS)
    assert (tmp_path / "cpu" / "sampled_depth.png").stat().st_size > 10_000


def loaded(model) -> LoadedModel:
    config = Config(model=model, data=DataConfig(seq_len=8))
    return LoadedModel(
        Path(), config, Mythos(model), tiny.variables(model), None, make_mesh(MeshConfig(), jax.devices()[:1]), None
    )


def test_a_side_costs_what_it_executes():
    side = Side(loaded(tiny.GQA_LAST), draft=(1, 2))
    parts = forward_flops(tiny.GQA_LAST, tiny.GQA_LAST.max_seq_len // 2)
    zeros = np.zeros((1, 7))
    drafted = SpeculativeResult(zeros, zeros, zeros, zeros, zeros, np.int32(3))
    # Six tokens after the first one, in three rounds of three tokens each, two of which are read out twice.
    expected = (3 * parts.at(3) + 2 * (parts.coda + parts.head)) * 3 / 6
    assert side.flops(3.0, drafted) == pytest.approx(expected)
    assert replace(side, draft=None).flops(2.0, None) == parts.at(2)
    difference = replace(side, loop_cache="all").kilobytes - replace(side, loop_cache="last").kilobytes
    assert difference * 1024 == 2 * 16 * 2 * 2 * 8 * 4  # loops, positions, keys and values, heads, channels, bytes


def test_the_table_of_latency(trained, monkeypatch, tmp_path, capsys):
    """What decodes is a stand-in; benchmarks.speculation and benchmarks.halting call the same functions."""
    monkeypatch.setattr(latency, "load_model", lambda path: loaded(tiny.GQA_LAST))
    monkeypatch.setattr(latency, "choose_policies", lambda *_: {"latent": Halting("latent", 0.1)})
    monkeypatch.setattr(latency, "measure", lambda loaded, rows, depth, loops, halting, cache: Point(0.1, 2.5, 1.7))
    monkeypatch.setattr(Side, "continued", lambda side, prompt, new: None)
    # 10 ms to the first token, and 2 ms for each one after it.
    monkeypatch.setattr(
        latency, "time_in_turns", lambda calls, _: ({n: [0.008 + 0.002 * c.args[1]] for n, c in calls.items()}, {})
    )
    tokens = np.arange(64, dtype=np.int32).reshape(8, 8) % tiny.V
    rows = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "mask": np.ones((8, 8), bool)}
    monkeypatch.setattr(latency, "open_data", lambda config: SimpleNamespace(held_out_batches=lambda *_: [rows]))
    latency.main(["--out", str(tmp_path), "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    name = SAMPLED.name("cpu")
    found = json.loads((tmp_path / "cpu" / "latency.json").read_text())
    assert found.pop("device") == jax.devices()[0].device_kind
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {side}" for side in found]
    assert len(found) == len(PLAIN) + 4 + len(latency.DRAFTS)
    assert found[f"{name}; last-loop cache"]["kilobytes"] < found[name]["kilobytes"]
    assert found[name]["token_ms"] + found[name]["first_ms"] == pytest.approx([2, 10])
    assert (tmp_path / "cpu" / "latency.png").stat().st_size > 10_000


def test_the_table_of_caches(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cache, "load_model", lambda path: loaded(tiny.GQA_LAST))
    monkeypatch.setattr(
        cache, "open_data", lambda config: SimpleNamespace(held_out_batches=lambda *_: [{"tokens": np.zeros((1, 8))}])
    )
    monkeypatch.setattr(cache, "measure", lambda loaded, rows, depth, loops, halting, rule: Point(0, loops, len(rule)))
    cache.main(["--out", str(tmp_path), "--seeds", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    # Prelude, coda and the slots of the loop; keys and values of 2 heads with 16 channels in float32.
    rows = [(FIXED, rule, slots) for rule, slots in (("all", (4, 8)), ("modulo:2", (2, 2)), ("first", (2, 2)))]
    for arm, rule, slots in [*rows, (SAMPLED, "last", (1, 1)), (cache.SHARED, "first loop alone", (1, 1))]:
        cells = [str((2 + n) * 2 * 2 * 16 * 4) for n in slots]
        loss = f"{len('all' if arm is cache.SHARED else rule)}.000 ± 0.000"
        assert f"| {arm.name('cpu')} | {rule} | {cells[0]} | {loss} | {cells[1]} | {loss} |" in lines
    assert (tmp_path / "cpu" / "cache.png").stat().st_size > 10_000
