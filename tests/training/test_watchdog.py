"""The watchdog ends a process that hangs; the process that the others wait for is named."""

import itertools
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from mythos_jax.config import TrainingConfig
from mythos_jax.training import pulse as pulse_module
from mythos_jax.training import watchdog as watchdog_module
from mythos_jax.training.pulse import Message, Pulse, blamed, slow_process
from mythos_jax.training.saving import SaveTimes
from mythos_jax.training.watchdog import Watchdog

# Sleeps in C without giving the interpreter to other threads.
KEEPS_THE_INTERPRETER = """
import ctypes
from mythos_jax.training.watchdog import Watchdog
with Watchdog(0.2) as watchdog:
    watchdog.beat("step 7")
    ctypes.PyDLL(None).sleep(90)
"""


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of the processes that would have ended here."""
    codes, happened = [], threading.Event()
    # A machine that stands still for a moment must not end the process of the tests.
    monkeypatch.setattr(watchdog_module._Alarm, "_start", lambda self, seconds: None)
    monkeypatch.setattr(watchdog_module, "LAST_WORDS", 60)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), happened.set()))
    return lambda seconds: codes if happened.wait(seconds) else []


def test_a_step_that_does_not_end_ends_the_process_after_the_stacks(ended, capfd):
    begin, told = time.monotonic(), []
    with Watchdog(0.3) as watchdog:
        watchdog.tell(told.append)
        watchdog.beat("step 7")
        assert ended(60) == [42]
    assert time.monotonic() - begin >= 0.2
    errors = capfd.readouterr().err
    problem = re.search(
        r"(step 7 has not ended for ([.\d]+) s \(training.hang_timeout\)); the stacks of all thr", errors
    )
    assert float(problem[2]) < 0.3  # what follows is within the timeout, too
    assert told == [problem[1]]
    assert "test_a_step_that_does_not_end" in errors  # the stack of the main thread


def test_a_save_in_the_background_must_end_too(ended, capfd):
    with Watchdog(0.3) as watchdog:
        watchdog.watch_saves(lambda: 5)
        for step in range(6000):
            watchdog.beat(f"step {step}", patience=1000)
            if ended(0.01):
                break
        assert ended(0) == [42]
    assert "mythos: writing the checkpoint of step 5 has not ended" in capfd.readouterr().err


class Looks:
    """The clock and the turns of a watchdog, of which the test gives each one."""

    def __init__(self, monkeypatch, watchdog):
        self.now, self.watchdog, self.left = 0.0, watchdog, 0
        monkeypatch.setattr(watchdog_module, "time", self)
        watchdog._stop, watchdog._thread = self, self
        self.go_on, self.looked = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=watchdog._watch, daemon=True)

    def monotonic(self):
        return self.now

    def start(self):
        self.thread.start()
        assert self.looked.acquire(timeout=60)

    def wait(self, turn):
        self.looked.release()
        self.go_on.acquire()
        self.now += turn
        return self.left < 0

    def pass_by(self, seconds):
        """As many turns as this takes."""
        end = self.now + seconds
        while self.now < end and self.thread.is_alive():
            self.go_on.release()
            while not self.looked.acquire(timeout=0.02) and self.thread.is_alive():
                pass

    def set(self):
        self.left = -1
        self.go_on.release()

    def join(self):
        self.thread.join(60)


@pytest.fixture
def watched(ended, monkeypatch):
    """watched(timeout): a watchdog, and its time."""

    def make(timeout):
        watchdog = Watchdog(timeout)
        return watchdog, Looks(monkeypatch, watchdog)

    return make


def test_it_leaves_a_process_alone_that_gets_on_or_has_not_begun(ended, watched):
    watchdog, looks = watched(100)
    with watchdog:
        looks.pass_by(200)
        steps = [0]  # one save after the other
        watchdog.watch_saves(lambda: steps[-1] // 4 if steps[-1] < 20 else None)
        for step in range(24):
            steps.append(step)
            watchdog.beat(f"step {step}")
            looks.pass_by(15)
        watchdog.beat("step 30", patience=100)
        looks.pass_by(200)
        assert ended(0) == []
    with Watchdog(0) as watchdog:
        watchdog.beat("step 1")
        assert ended(0.1) == []


def test_a_save_that_has_ended_during_a_long_evaluation_is_not_held_against_it(ended, watched):
    writing = [5]
    watchdog, looks = watched(60)
    with watchdog:
        watchdog.watch_saves(lambda: writing[0])
        watchdog.beat("the evaluation after step 5", patience=100)
        looks.pass_by(20)
        writing[0] = None
        looks.pass_by(80)
        assert ended(0) == []


def test_it_rests_while_data_is_prepared_and_watches_again_after(ended, watched, capfd):
    watchdog, looks = watched(60)
    with watchdog:
        watchdog.beat("the start", patience=1)
        looks.pass_by(20)
        with watchdog.resting():
            looks.pass_by(150)
            assert ended(0) == []
        looks.pass_by(20)
        assert ended(0) == []
        looks.pass_by(60)
        assert ended(60) == [42]
    assert "mythos: the start has not ended" in capfd.readouterr().err


def test_what_is_wrong_with_the_last_words_does_not_keep_the_process(ended, capfd, monkeypatch):
    monkeypatch.setattr(Pulse, "suspects", lambda *_: {}["no message"])
    with Watchdog(0.2) as watchdog:
        watchdog.tell(lambda _: {}["no file"])
        watchdog.beat("step 7")
        assert ended(60) == [42]
    assert "mythos: ends, because it hangs" in capfd.readouterr().err


def test_a_system_without_the_timer_is_announced_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "other")
    with Watchdog(1):
        pass
    assert capsys.readouterr().err.count("training.hang_timeout: there is no timer of the C library here") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a timer of Linux")
def test_code_that_keeps_the_interpreter_to_itself_is_ended_too():
    result = subprocess.run([sys.executable, "-c", KEEPS_THE_INTERPRETER], capture_output=True, text=True, timeout=100)
    assert result.returncode == 42
    assert 'File "<string>", line 6 in <module>' in result.stderr


def message(process, doing="step 9", count=2, own=0.01, step_time=1.0):
    return Message(process, f"host{process}", count, doing, own, step_time)


def by_process(*messages):
    return {m.process: m for m in messages}


def test_the_process_that_the_others_wait_for_is_named():
    first = by_process(*(message(i, count=1) for i in range(4)))
    alive = [message(0), message(1), message(3)]
    silent = by_process(*alive, message(2, "reading the rows of step 9", count=1))
    assert blamed(first, silent) == ("process 2 on host2 does not answer, it was last at reading the rows of step 9")
    elsewhere = by_process(*alive, message(2, "the save after step 8"))
    assert blamed(first, elsewhere) == "process 2 on host2 is at the save after step 8, most are at step 9"
    assert blamed(first, by_process(*alive, message(2))) == ""
    two = by_process(message(0), message(1, "reading the rows of step 9"))
    assert blamed(first, two) == "process 0 on host0 is at step 9; process 1 on host1 is at reading the rows of step 9"


def test_a_process_is_slow_if_its_own_work_is_what_a_step_takes():
    even = [message(i, own=0.1) for i in range(7)]
    assert slow_process([*even, message(7, own=0.5)]) == message(7, own=0.5)
    assert slow_process([*even, message(7, own=0.14)]) is None  # hardly more than the others
    assert slow_process([*even, message(7, own=0.5, step_time=10)]) is None  # hidden behind the devices' work
    assert slow_process([message(0, own=0.5)]) is None
    assert slow_process([*even, message(7, own=0.5), message(8, own=0.0, step_time=0.0)]) is None  # 8 has not begun


def test_waiting_for_a_device_is_not_a_process_own_work(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pulse_module.time, "monotonic", clock)
    clock.seconds, pulse = 5.0, Pulse()
    pulse.step()  # the first one does not count
    for _ in range(2):
        clock.seconds += 1
        with pulse.waiting():
            clock.seconds += 4
        pulse.step()
    told = pulse._message()
    assert (told.own, told.step_time) == (1, 5)
    assert (pulse._message().own, pulse._message().count) == (told.own, 3)  # no step since


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize("minutes", [0.5, 10])
def test_checkpoints_are_due_by_steps_and_by_time(minutes):
    clock, saved, looks = Clock(), [], []
    times = SaveTimes(TrainingConfig(checkpoint_every=700, checkpoint_minutes=minutes), 0, clock)
    original = times._steps_left
    times._steps_left = lambda step: looks.append(step) or original(step)
    for step in range(1, 3001):
        clock.seconds += 100 if step == 1 else 0.5 if step < 1500 else 2.0  # compiles; becomes slower
        if times.due(step):
            saved.append((step, clock.seconds))
            times.saved()
    assert {700, 1400, 2100, 2800} <= {step for step, _ in saved}
    between = [b - a for (_, a), (_, b) in itertools.pairwise(saved)]
    assert max(between[1:]) <= 60 * minutes + 2 * 2.0
    assert sum(step % 700 != 0 for step, _ in saved) == (len(saved) - 4) > 0
    assert len(looks) < 12 * len(saved)  # processes ask each other rarely
    by_steps = SaveTimes(TrainingConfig(checkpoint_every=700), 0, clock)
    assert [step for step in range(1, 3001) if by_steps.due(step)] == [700, 1400, 2100, 2800]
