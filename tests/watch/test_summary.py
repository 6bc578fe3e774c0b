"""States, times and comparisons against timelines made by hand."""

import json
import time
from dataclasses import asdict, replace

import pytest

from mythos_jax.runs.owner import Owner
from mythos_jax.watch.comparison import compare_losses
from mythos_jax.watch.reading import WatchedRun
from mythos_jax.watch.summary import Times, duration, names, summarise_all


def summary(made):
    (found,) = summarise_all([WatchedRun(made.path)])
    return found


def line(step, now, pace=None, **more):
    return {"step": step, "time": now, "loss": 2.0, **({} if pace is None else {"step_seconds_p50": pace}), **more}


def test_where_the_time_of_a_run_with_two_restarts_went(make_run):
    """Started at 1000. Steps 1 to 45 at 2 s each after 30 s of compiling, killed at 1120; started again at
    1300 after step 30, compiles for 20 s, steps 31 to 60 at 1 s, stopped after step 60 at 1360; started at 1400, and
    finishes step 100 at 1 s each at 1460. What is in the log of steps 31 to 40 is that of the second start."""
    made = make_run()
    made.event("start", 1000.0, step=0, reached=0)
    made.event("start", 1300.0, step=30, reached=45, reached_time=1120.0)
    made.event("end", 1360.0, step=60, how="stopped", message="SIGTERM")
    made.event("start", 1400.0, step=60, reached=60, reached_time=1358.0)
    made.event("end", 1460.0, step=100, how="finished")
    made.log(line(1, 1032.0), *(line(step, 1030.0 + 2 * step, 2.0) for step in (10, 20, 30)))
    made.log(*(line(step, 1290.0 + step, 1.0) for step in (40, 50, 60)), {"step": 60, "held_out_loss": 2.25})
    made.log(*(line(step, 1360.0 + step, 1.0) for step in (70, 80, 90, 100)))
    found = summary(made)
    assert (found.state, found.restarts, found.lost_steps, found.seconds_left) == ("finished", 2, 15, None)
    counted = 30 * 2 + 70 * 1
    lost = 15 * 1  # at the median pace of all lines
    assert found.times == Times(total=460.0, counted=counted, lost=lost, down=(1300 - 1120) + (1400 - 1360))
    assert found.times.goodput == pytest.approx(counted / 460)
    assert found.times.rest == pytest.approx(460 - counted - lost - 220)
    assert json.loads(json.dumps(found.to_json()))["goodput_since_first_start"] == round(counted / 460, 4)


def test_a_run_of_an_earlier_version_has_no_times(make_run):
    made = make_run(steps=20)
    made.log({"step": 10, "loss": 2.0, "goodput": 0.5}, {"step": 20, "loss": 1.0})
    found = summary(made)
    assert (found.state, found.times, found.restarts, found.lost_steps) == ("finished", None, None, None)
    assert found.to_json()["last"] == {"loss": 1.0, "goodput": 0.5}


def owned(made, **fields):
    owner = replace(Owner.this_process(), **fields)
    (made.path / "lock.json").write_text(json.dumps(asdict(owner)))


DEAD = {"pid": 2**22 + 1}  # above the largest number that Linux gives
ELSEWHERE = {"place": "another machine", "host": "there"}


@pytest.mark.parametrize(
    ("owner", "events", "age", "expected"),
    [
        ({}, [], None, ("starting", "")),
        ({}, [("start", 100)], 110, ("starting", "")),  # the line is of an earlier start
        ({}, [("start", 100)], 3, ("training", "")),
        ({}, [("start", 900)], 300, ("silent", "no line for 5 min")),
        ({}, [("start", 900), ("end", 800, "stopped", "SIGTERM")], 810, ("starting", "")),
        (DEAD, [("start", 900)], 300, ("lost", "")),
        (DEAD, [("start", 900), ("end", 300, "failed", "step 7 hangs")], 300, ("failed", "step 7 hangs")),
        (ELSEWHERE, [("start", 900)], 3, ("training", "")),
        (ELSEWHERE | {"renewed": 1.0}, [("start", 900)], 300, ("lost", "")),
        (None, [("start", 900), ("end", 300, "stopped", "SIGTERM")], 300, ("stopped", "by SIGTERM")),
        (None, [("start", 900), ("end", 300, "failed", "step 7: loss is nan")], 300, ("failed", "step 7: loss is nan")),
        (None, [("start", 900)], 300, ("ended", "no process trains here")),
        (None, [], None, ("ended", "no process trains here")),
    ],
)
def test_the_state_of_a_run(make_run, owner, events, age, expected):
    """age: of the last line, in seconds; so are the events' times."""
    made, now = make_run(), time.time()
    for event, seconds, *how in events:
        made.event(event, now - seconds, step=0, **dict(zip(["how", "message"], how, strict=False)))
    if age is not None:
        made.log(line(50, now - age))
    if owner is not None:
        owned(made, **owner)
    found = summary(made)
    assert found.state == expected[0]
    assert found.detail == expected[1] or (found.state == "lost" and "the same command resumes" in found.detail)


def test_a_slow_run_is_not_silent(make_run):
    """A line every 50 s: none for 300 s is nothing unusual yet, none for 600 s is."""
    for silence, state in [(300, "training"), (600, "silent")]:
        made, now = make_run(f"run{silence}"), time.time()
        made.log(*(line(step, now - silence - 50 * (10 - step)) for step in range(1, 11)))
        owned(made)
        assert summary(made).state == state


def test_the_time_left_is_by_the_pace_of_this_start(make_run):
    """Ten steps take 20 s since the start, and took 500 s before it."""
    made, now = make_run(steps=100), time.time()
    made.event("start", now - 9000, step=0)
    made.event("start", now - 200, step=20)
    made.log(line(10, now - 9000), line(20, now - 8500))
    made.log(*(line(step, now - 2 * (60 - step)) for step in (30, 40, 50, 60)))
    owned(made)
    assert summary(made).seconds_left == pytest.approx(40 * 2)


def test_losses_at_equal_steps(make_run):
    """Lines at every step, and at every third; the third run has logged nothing."""
    first, second, third = make_run("a"), make_run("b"), make_run("c")
    first.log(*({"step": step, "loss": float(step)} for step in range(1, 21)))
    second.log(*({"step": step, "loss": 100.0 * step} for step in range(3, 13, 3)), {"step": 12, "held_out_loss": 1.0})
    runs = [WatchedRun(made.path) for made in (first, second, third)]
    found = compare_losses(runs, rows=4)
    assert found.rows == [
        (3, [2.0, 300.0, None]),
        (6, [5.0, 600.0, None]),
        (9, [8.0, 900.0, None]),
        (12, [11.0, 1200.0, None]),
    ]
    assert found.note == "mean of the losses logged since the row above"
    runs[1].config = replace(runs[1].config, data=replace(runs[1].config.data, seq_len=64))
    assert compare_losses(runs).note.endswith("; a step has 128, 256, 128 tokens")
    assert compare_losses([runs[2]]).rows == []


def test_runs_of_one_name_are_told_apart(make_run):
    runs = [WatchedRun(make_run(f"{folder}/run").path) for folder in ("a", "b")] + [WatchedRun(make_run("c").path)]
    assert names(runs[:1]) == ["tiny"]
    assert names(runs[1:]) == ["run", "c"]
    assert names(runs) == [str(run.path) for run in runs]


def test_durations():
    seconds = [0.4, 59, 89, 90, 59 * 60, 3600, 3660 * 5, 86400 * 2 + 3600 * 4]
    words = ["0 s", "59 s", "89 s", "2 min", "59 min", "1 h 00 min", "5 h 05 min", "2 d 4 h"]
    assert [duration(value) for value in seconds] == words
