"""The watchdog of a training process: when nothing gets on for `training.hang_timeout`, it prints the stacks of all
threads and who is to blame, and ends the process with exit code 42, so that the run is started again.

A thread of Python does it. Where that cannot run, because code in C keeps the interpreter to itself, a timer of the C
library does.
"""

import contextlib
import ctypes
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mythos_jax.calls import Call
from mythos_jax.errors import RESTART
from mythos_jax.processes import SHUTDOWN_GRACE, is_process_zero, is_single_process, log0, process_prefix
from mythos_jax.streams import say
from mythos_jax.training.pulse import ANSWER, LOOKS_APART, Pulse

TURNS = 60  # that the thread takes in a timeout, each of them a second or less
LAST_WORDS = 1.0  # seconds that the stacks and the event take, about
COMPILING = 3  # timeouts that the start and the first step may take, which compile


class Watchdog:
    """Used as a context: inside, each call of `beat` says that the main thread gets on, and with what.

    Time in which the process itself does not run (Ctrl-Z, a suspended machine) does not count, up to twice the timeout.
    """

    def __init__(self, timeout: float) -> None:
        """timeout: seconds; 0: never."""
        self._timeout = timeout
        self.pulse = Pulse()
        self._turn = min(1.0, timeout / TURNS)
        self._telling: Callable[[str], None] = lambda _: None
        self._beat: tuple[str, float] | None = None  # replaced by each beat, so that the thread can tell them apart
        self._writing: Callable[[], int | None] = lambda: None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.pulse.__enter__()
        if self._timeout:
            self._alarm, self._prefix = _Alarm(), process_prefix()
            # The process has ended within the timeout, having said its last words and found out who is to blame.
            words = LAST_WORDS if is_single_process() else LAST_WORDS + ANSWER + SHUTDOWN_GRACE
            self._limit = self._timeout - self._turn - min(words, self._timeout / 4)
            self._alarm.set(2 * self._timeout)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.pulse.__exit__()
        if self._timeout:
            self._thread.join()
            self._alarm.cancel()

    def beat(self, doing: str, patience: float = 1) -> None:
        """The main thread gets on. doing: what it is doing now. patience: timeouts that this may take."""
        self._beat = (doing, patience)
        self.pulse.doing = doing

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Around what may take hours: it is not watched. What was watched before begins anew after it."""
        before, self._beat = self._beat, None
        yield
        if before is not None:
            self.beat(*before)

    def watch_saves(self, writing: Callable[[], int | None]) -> None:
        """writing: says of which step a checkpoint is being written in the background, which must end within a timeout,
        too; None if none is. The thread asks it."""
        self._writing = writing

    def tell(self, telling: Callable[[str], None]) -> None:
        """telling: writes why the process ends where `mythos watch` finds it."""
        self._telling = telling

    def _watch(self) -> None:
        last, quiet, saving, saved_for, now = self._beat, 0.0, self._saving(), 0.0, time.monotonic()
        while not self._stop.wait(self._turn):
            self._alarm.set(2 * self._timeout)
            before, now = now, time.monotonic()
            passed = min(now - before, 5 * self._turn)  # more: this process did not run
            last, quiet = self._beat, quiet + passed if last is self._beat else 0.0
            saved_before, saving = saving, self._saving()
            saved_for = saved_for + passed if saving == saved_before else 0.0
            left, doing, seconds = math.inf, "", 0.0
            if last is not None:
                left, doing, seconds = self._limit * last[1] - quiet, last[0], quiet
            if saving is not None and self._limit - saved_for < left:
                left, doing = self._limit - saved_for, f"writing the checkpoint of step {saving}"
                seconds = saved_for
            if left <= 0:
                return self._end(doing, seconds)
            if left <= LOOKS_APART:
                self.pulse.look(doing)

    def _saving(self) -> int | None:
        with contextlib.suppress(Exception):  # must not end the thread: the timer would end the process
            return self._writing()
        return None

    def _end(self, doing: str, seconds: float) -> None:
        try:
            problem = f"{doing} has not ended for {seconds:.3g} s (training.hang_timeout)"
            say(f"mythos: {self._prefix}{problem}; the stacks of all threads:")
            told = Call(lambda: self._telling(problem))  # in a thread, because storage may be what hangs
            _print_stacks()
            told.ended.wait(LAST_WORDS / 2)
            with contextlib.suppress(Exception):  # who is to blame is not known, then
                if suspects := self.pulse.suspects(doing):
                    say(f"mythos: {self._prefix}{suspects}")
            say(f"mythos: {self._prefix}ends, because it hangs; run the same command again")
            if is_process_zero() and not is_single_process():
                time.sleep(SHUTDOWN_GRACE)  # the others ask this process
        finally:
            os._exit(RESTART)


def _print_stacks() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # standard error is no file
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


class _Alarm:
    """Ends the process with exit code 42 at a time that is put off again and again, whatever Python is doing then."""

    def __init__(self) -> None:
        self._timer: Any = None
        self._open()
        if self._timer is None:
            log0(
                "training.hang_timeout: there is no timer of the C library here, so a process is not ended that hangs "
                "in code which keeps Python's interpreter to itself"
            )

    def _open(self) -> None:
        if sys.platform != "linux":
            return
        with contextlib.suppress(OSError, AttributeError):
            self._library = ctypes.CDLL(None)
            end = ctypes.cast(self._library._exit, ctypes.c_void_p).value
            event, timer = _SignalEvent(value=RESTART, notify=_SIGEV_THREAD, function=end), ctypes.c_void_p()
            if self._library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) == 0:
                self._timer = timer

    def set(self, seconds: float) -> None:
        """The stacks are printed after this time, and the process ends a second later."""
        if self._timer is None:
            return
        with contextlib.suppress(AttributeError, OSError, ValueError):
            faulthandler.dump_traceback_later(seconds, file=sys.stderr)
        self._start(seconds + 1)

    def cancel(self) -> None:
        if self._timer is not None:
            faulthandler.cancel_dump_traceback_later()
            self._library.timer_delete(self._timer)

    def _start(self, seconds: float) -> None:
        when = _TimerSpec(seconds=int(seconds), nanoseconds=int(seconds % 1 * 1e9))
        self._library.timer_settime(self._timer, 0, ctypes.byref(when), None)


_SIGEV_THREAD = 2  # calls a function in a thread of its own


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of Linux."""

    _fields_ = (
        ("value", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 32),
    )


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec` of Linux on 64 bits."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )
