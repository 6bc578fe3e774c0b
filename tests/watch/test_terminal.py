"""The view in terminals of many sizes, and curves as characters."""

import io
import math
import re

import pytest
from rich.console import Console

from mythos_jax.watch.history import Curve
from mythos_jax.watch.plot import Plotted, plot, sparkline
from mythos_jax.watch.reading import WatchedRun
from mythos_jax.watch.terminal import view
from tests.watch.conftest import maker


def printed(runs, width, height=None):
    console = Console(file=io.StringIO(), width=width)
    console.print(view(runs, width, height))
    return console.file.getvalue().splitlines()


def rows(steps, **values):
    named = {name: value if callable(value) else lambda step, value=value: value for name, value in values.items()}
    return [{"step": step, **{name: value(step) for name, value in named.items()}} for step in steps]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One with experts, restarts and everything, one without, one that has logged nothing."""
    make_run = maker(tmp_path_factory.mktemp("runs"))
    rich, plain, new = (
        make_run("rich", name="rich"),
        make_run("plain", name="plain", steps=60),
        make_run("new", name="new"),
    )
    rich.event("start", 1000.0, step=0, reached=0)
    rich.event("start", 1050.0, step=20, reached=25, reached_time=1025.0)
    load = {"expert_load": [[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]], "load_imbalance": 2.0}
    memory = {"hbm_bytes": 2**33, "hbm_peak_bytes": 3 * 2**32, "hbm_limit_bytes": 2**34}
    times = {"step_seconds_p50": 0.5, "step_seconds_p90": 0.75, "step_seconds_max": 1.5, "data_wait": 0.002}
    rates = {"tokens_per_second": lambda step: 1000.0 * step, "flops_per_second": 3.25e13, "mfu": 0.165}
    loss = {"loss": lambda step: 4 * math.exp(-step / 50), "mean_loops": lambda step: 1 + step / 25}
    rich.log(*rows(range(1, 76), time=lambda step: 1000.0 + step, **loss, **times, **rates, **load, **memory))
    rich.log({"step": 75, "held_out_loss": 1.125})
    plain.log(*rows(range(2, 61, 2), loss=lambda step: 2.0 if step > 30 else None, mean_loops=1))
    return [WatchedRun(made.path) for made in (rich, plain, new)]


def test_one_run_shows_everything(runs):
    lines = printed(runs[:1], 100)
    text = re.sub(" +", " ", " ".join(lines))
    assert lines[0] == "rich  ended  step 75 of 100 (75%)"
    for word in [
        "loss 0.8925", "held out 1.1250", "depth 4.00 loops",
        "500 ms median, 750 ms p90, 1.50 s longest", "2 ms per step", "75,000", "32.5 TFLOP/s", "16.5 %",
        "8.0 GiB of 16.0, peak 12.0", "restarts 1, 5 steps lost", "2.00 times even",
        "experts, layer 1 █▅▃▃ 0.50 to 2.00 times even, of 4",
        "experts, layer 2 ████ 1.00 to 1.00 times even, of 4",
    ]:  # fmt: skip
        assert word in text, word
    # 75 steps of 0.5 s in the 75 s from the first start to the last line
    assert "goodput 50.0%" in text
    assert "38 s steps that count, 2 s steps that were lost, 25 s not running, 10 s compiling" in text


def test_several_runs_are_compared(runs):
    lines = printed(runs, 110)
    assert " ".join(lines[1].split()) == "1 rich ended 75 of 100 (75%) 0.8925 1.1250 4.00 75,000 16.5% 50.0% 1 5"
    assert " ".join(lines[2].split()) == "2 plain finished 60 of 60 (100%) 2.0000 – 1.00 – – – – –"
    assert " ".join(lines[3].split()) == "3 new ended 0 of 100 (0%) – – – – – – – –"
    (last,) = [line for line in lines if line.startswith("  60 ")]
    mean = sum(4 * math.exp(-step / 50) for step in range(53, 61)) / 8
    assert last.split() == ["60", f"{mean:.4f}", "2.0000", "–"]
    assert [line[0] for line in lines[1:4]] == ["1", "2", "3"]


@pytest.mark.parametrize(("width", "height"), [(30, 12), (60, 4), (80, 24), (200, 60)])
def test_the_view_fits(runs, width, height):
    for watched in (runs, runs[:1], runs[1:2], runs[2:]):
        lines = printed(watched, width, height)
        assert all(len(line) <= width for line in lines)
        chart = [line for line in lines if "┤" in line or "│" in line]
        assert not chart or len(lines) <= height


def curve(points):
    made = Curve()
    for step, value in points:
        made.add(step, value)
    return made


def dots(lines, gutter=9):
    """(column, row) of every Braille dot, from the chart's lines without its axis."""
    places = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1), 5: (1, 2), 6: (0, 3), 7: (1, 3)}
    found = set()
    for row, line in enumerate(lines[:-2]):
        for column, character in enumerate(line.plain[gutter:]):
            bits = ord(character) - 0x2800 if "\u2800" <= character <= "\u28ff" else 0
            found |= {(2 * column + x, 4 * row + y) for bit, (x, y) in places.items() if bits >> bit & 1}
    return found


def test_an_exponential_decay_is_a_straight_line():
    lines = plot([Plotted(curve((step, 8 * 0.5 ** (step / 10)) for step in range(41)), "cyan")], width=30, height=10)
    found = dots(lines)
    assert len(lines) == 12
    assert (0, 0) in found
    assert (39, 39) in found
    assert all(abs(x - y) <= 1 for x, y in found)
    assert {x for x, _ in found} == set(range(40))
    assert [line.plain[:9].strip(" ┤│") for line in lines[:10]] == ["8", *[""] * 4, "2", *[""] * 3, "0.5"]
    assert lines[-1].plain.split() == ["0", "step", "40"]


def test_points_are_joined_and_marked():
    """Two runs, one of which ends half-way; both have three points."""
    a = Plotted(curve([(0, 1.0), (10, 100.0), (20, 1.0)]), "cyan", "1")
    b = Plotted(curve([(0, 10.0), (5, 10.0), (10, 10.0)]), "red", "2")
    lines = plot([a, b], width=30, height=5)
    assert {x for x, _ in dots(lines)} >= set(range(38))
    ends = {
        mark: (row, line.plain.rindex(mark))
        for row, line in enumerate(lines[:-2])
        for mark in "12"
        if mark in line.plain[9:]
    }
    assert ends == {"1": (4, 28), "2": (2, 20)}


@pytest.mark.parametrize("values", [[], [math.nan], [0.0, -1.0], [2.0], [2.0, 2.0], [1e-300, 1e300], [math.inf, 1.0]])
def test_odd_values_are_drawn_or_left_out(values):
    lines = plot([Plotted(curve(enumerate(values)), "cyan", "1")], 40, 6)
    drawable = [value for value in values if 0 < value < math.inf]
    assert len(lines) == (8 if drawable else 0)
    assert bool(dots(lines)) == bool(drawable) or len(drawable) == 1
    assert len(sparkline(values, 5)) <= 5


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 10) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7, math.nan], 2) == "▁█"
    assert sparkline([0.5, 0.5], 9, low=0.0) == "██"
    assert sparkline([3, 3, 3], 9) == "▄▄▄"
    assert len(sparkline(range(1000), 37)) == 37
