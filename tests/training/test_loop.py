"""The order of what happens after a step: its lines of the log, the save, the evaluation."""

import numpy as np
import pytest

from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.training import train as training
from mythos_jax.training.loggers import JsonlLogger
from mythos_jax.training.pulse import Message
from mythos_jax.training.train import train
from tests.survival import assert_same, lines, parameters, timeless, with_training

SLOW = Message(1, "node7", count=2, doing="step 9", own=0.4, step_time=1.0), 0.02


def test_a_checkpoint_outlives_the_evaluation_after_its_step(config, uninterrupted, tmp_path, monkeypatch):
    """Two evaluations are cut short, the last one among them. The log is that of a run in which none was."""
    config, run = with_training(config, evaluate_every=2, checkpoint_every=4), tmp_path / "run"
    measure, beats, measured, cut = training._Loop._held_out_loss, [], {}, {4, 8}

    def evaluated(loop, state, step):
        measured[step] = measure(loop, state, step)
        if step in cut:
            cut.remove(step)
            raise KeyboardInterrupt
        return measured[step]

    monkeypatch.setattr(training._Loop, "_held_out_loss", evaluated)
    monkeypatch.setattr(training.Watchdog, "beat", lambda self, doing, patience=1: beats.append(doing))
    for saved in [[4], [4]]:
        with pytest.raises(KeyboardInterrupt):
            train(config, run, progress=False)
        assert Checkpoints(run / "checkpoints", read_only=True).steps() == saved
    train(config, run, progress=False)
    rows = timeless(lines(run))
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    assert [row for row in rows if "loss" in row] == timeless(lines(uninterrupted))
    held_out = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    assert sorted(held_out) == [2, 4, 6, 8]
    assert held_out == measured
    assert_same(parameters(uninterrupted), parameters(run))
    n = int(next(beat for beat in beats if beat.startswith("batch 1 of ")).split()[3])
    assert n > 1  # each of them is a sign of life, and so is each that is read
    for step in [2, 4, 6, 8]:
        assert {f"batch {i + 1} of {n} of the evaluation after step {step}" for i in range(n)} <= set(beats)
    assert {f"reading the held-out rows, after {i + 1} batches" for i in range(n)} <= set(beats)


class NotYet:
    """A number that is never there yet when it is asked for."""

    def __init__(self, value):
        self.value = value

    def is_ready(self):
        return False

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value, dtype)


def test_no_line_comes_after_one_of_a_later_step(config, tmp_path, monkeypatch):
    """W&B would drop it."""
    make, written = training.make_train_step, []

    def make_slow(*arguments):
        step = make(*arguments)

        def slow(*now):
            state, metrics = step(*now)
            return state, {**metrics, "loss": NotYet(metrics["loss"])}

        return slow

    monkeypatch.setattr(training, "make_train_step", make_slow)
    monkeypatch.setattr(training.Watchdog, "beat", lambda self, *_, **__: setattr(self.pulse, "_slow", SLOW))
    monkeypatch.setattr(JsonlLogger, "write", lambda self, step, metrics: written.append((step, *metrics)))
    train(config, tmp_path / "run", progress=False)
    assert {step for step, name, *_ in written if name == "slow_process"} == set(range(1, 9))
    steps = [step for step, *_ in written]
    assert steps == sorted(steps)
