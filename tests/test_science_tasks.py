"""The scripts of benchmarks/science on reasoning tasks: what they compute from exact matches, and their tables."""

import json

import numpy as np
import pytest

from benchmarks import exact_match
from benchmarks.science import mano, positions
from mythos_jax.config import load_config
from mythos_jax.data.open import open_data


def results(config, right):
    """Of a run that is right where `right(difficulty, loops)` is, and else in 5 %."""
    pairs = [(n, loops) for n in config.evaluation.difficulties for loops in config.evaluation.loops]
    return [{"difficulty": n, "loops": r, "exact_match": 0.97 if right(n, r) else 0.05} for n, r in pairs]


@pytest.mark.parametrize("size", positions.SIZES)
def test_the_data_of_all_sizes_exist(size):
    for loops in positions.SIZES[size][1]:
        config = load_config(exact_match.TASKS / "group.yaml", positions.overrides(size, loops))
        assert {loops, 2 * loops} <= set(config.evaluation.loops)
        open_data(config)
    depth, widths, _ = mano.SIZES[size]
    executed = {(c.model.loop_layers * c.model.loops) for c in (mano.config_of(size, k, depth // k) for k in widths)}
    assert executed == {depth}
    open_data(mano.config_of(size, 1, depth))


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_the_exponent_of_known_speeds(exponent, monkeypatch, tmp_path, capsys):
    """Of models that solve (12 / T)^exponent positions per loop, rounded down to whole positions."""

    def run(config, workdir):
        speed = (12 / config.model.loops) ** exponent
        return results(config, lambda n, loops: n <= speed * min(loops, config.model.loops) + 1e-9)

    monkeypatch.setattr(exact_match, "run", run)
    positions.main(["--out", str(tmp_path), "--seeds", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "cpu" / "positions.json").read_text())
    assert found["exponent"][0] == pytest.approx(exponent, abs=0.05)
    assert lines[-1].startswith(f"exponent: {found['exponent'][0]:.2f} (")
    if exponent == 1.0:
        assert found["positions"]["6"] == [{"1": 2, "2": 4, "3": 6, "4": 8, "5": 10, "6": 12, "9": 12, "12": 12}] * 2
        assert "| 6 | 2 | 6.0 ± 0.0 | 12.0 ± 0.0 | 12.0 ± 0.0 | 2.00 ± 0.00 |" in lines
    assert (tmp_path / "cpu" / "positions.png").stat().st_size > 10_000


def test_positions_count_up_to_the_first_that_is_not_solved():
    run = [
        {"difficulty": n, "loops": loops, "exact_match": value}
        for loops, values in {2: [1.0, 0.9, 0.89, 1.0], 1: [0.5, 1.0, 1.0, 1.0]}.items()
        for n, value in enumerate(values, 1)
    ]
    assert positions.solved(run) == {1: 0, 2: 2}
    assert positions.per_loop({1: 0, 2: 8, 4: 15, 8: 16}) == 15 / 4
    assert positions.per_loop({1: 0, 2: 0}) == 0
    assert np.isnan(positions.fitted_exponent([1.0, 2.0], [1.0, 0.0]))


def test_the_table_of_mano(monkeypatch, tmp_path, capsys):
    """Of models that solve as many operations as they execute layers."""
    asked = []

    def run(config, workdir):
        asked.append(config)
        return results(config, lambda n, loops: n <= config.model.loop_layers * loops)

    monkeypatch.setattr(exact_match, "run", run)
    for _ in range(2):  # finished runs are not repeated
        mano.main(["--out", str(tmp_path), "--seeds", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(asked) == 2 * 5
    row = next(line for line in lines if line.startswith("| 2 x 1 |"))
    assert "| 97.0 ± 0.0 | 5.0 ± 0.0 |" in row
    assert (tmp_path / "cpu" / "mano.png").stat().st_size > 10_000
