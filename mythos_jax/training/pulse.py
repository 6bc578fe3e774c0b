"""What each process of a run is doing, told to the others through jax's key-value store: names the process that the
others wait for, when they hang, and the one that is slow, when they do not.

Nothing is asked of the devices, and no step waits for it.
"""

import contextlib
import json
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import jax

from mythos_jax.calls import Call
from mythos_jax.processes import client, is_process_zero, is_single_process, log0

PERIOD = 2.0  # seconds between two messages of a process
COMPARED_EVERY = 30.0  # seconds between two comparisons by process 0
ANSWER = 3.0  # seconds that process 0 is given to answer
LOOKS_APART = 2 * PERIOD  # seconds between the two looks at all messages that tell who is silent
KEY = "mythos/pulse"
# A process is slow if its own work takes this many times as long as that of the median process, and that fraction of a
# step.
SLOW, OF_STEP = 1.5, 0.1
ANNOUNCED_EVERY = 600.0  # seconds between two lines about slow processes


@dataclass(frozen=True)
class Message:
    """What a process tells about itself. count: of its messages. own: seconds per step that it spent on work of its
    own, such as reading rows, and not waiting for a device; step_time: seconds per step in all. Both are of the steps
    since the message before."""

    process: int
    host: str
    count: int
    doing: str
    own: float = 0.0
    step_time: float = 0.0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class Pulse:
    """A context: inside, a thread sends messages, and on process 0 compares those of all. In a single process it does
    nothing."""

    def __init__(self) -> None:
        self.doing = "the start"  # what the main thread is doing
        self._slow: tuple[Message, float] | None = None
        self._lock, self._now = threading.Lock(), 0.0  # when the last step ended; 0: none has
        self._steps, self._waited, self._seconds = 0, 0.0, 0.0  # since the last message
        self._own = self._step_time = 0.0  # of the last message that had steps
        self._count, self._host_of_0, self._announced = 0, "", -ANNOUNCED_EVERY
        self._first: tuple[str, float, Call] | None = None  # look: why, when it began, and its call
        self._stop = threading.Event()

    def __enter__(self) -> "Pulse":
        if not is_single_process():
            threading.Thread(target=self._send_until_stopped, name="pulse", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for a device, and so for the slowest process."""
        begin = time.monotonic()
        yield
        with self._lock:
            self._waited += time.monotonic() - begin

    def step(self) -> None:
        """A step has ended. The first one, which compiles, does not count."""
        with self._lock:
            before, self._now = self._now, time.monotonic()
            if before:
                self._steps, self._seconds = self._steps + 1, self._seconds + self._now - before
            else:
                self._waited = 0.0

    def slow(self) -> dict[str, float]:
        """For the log of process 0, after each comparison: the process that the others wait for; empty if there is
        none, or nothing new."""
        found, self._slow = self._slow, None
        if found is None:
            return {}
        slowest, others = found
        own = {"slow_process_seconds": round(slowest.own, 6), "median_process_seconds": round(others, 6)}
        return {"slow_process": slowest.process, **own}

    def look(self, why: str) -> None:
        """Begins the first of the two looks that `suspects` compares, unless it has just begun for the same reason.
        Called `LOOKS_APART` before `suspects`, it spares the wait there."""
        if is_single_process():
            return
        first, now = self._first, time.monotonic()
        if first is None or first[0] != why or now - first[1] > 4 * LOOKS_APART:
            self._first = why, now, Call(_read)

    def suspects(self, why: str) -> str:
        """In words, which processes do not answer, or do something else than the others; empty if none is known."""
        self.look(why)
        if self._first is None:
            return ""
        _, began, call = self._first
        if first := _answer(call, began):
            time.sleep(max(began + LOOKS_APART - time.monotonic(), 0))
            if second := _answer(Call(_read), time.monotonic()):
                return blamed(first, second)
        return f"process 0{self._host_of_0} does not answer"

    def _send_until_stopped(self) -> None:
        compared = time.monotonic()
        while not self._stop.wait(PERIOD):
            with contextlib.suppress(Exception):  # process 0 is gone; jax's own heartbeat tells
                client().key_value_set(f"{KEY}/{jax.process_index()}", json.dumps(asdict(self._message())), True)
                if not self._host_of_0 and (found := _read()) and 0 in found:
                    self._host_of_0 = f" on {found[0].host}"
                if is_process_zero() and time.monotonic() - compared >= COMPARED_EVERY:
                    compared = time.monotonic()
                    self._compare(list(_read().values()))

    def _message(self) -> Message:
        self._count += 1
        with self._lock:
            if self._steps:
                self._own = max(self._seconds - self._waited, 0) / self._steps
                self._step_time = self._seconds / self._steps
                self._steps, self._waited, self._seconds = 0, 0.0, 0.0
        host = socket.gethostname()
        return Message(jax.process_index(), host, self._count, self.doing, self._own, self._step_time)

    def _compare(self, messages: list[Message]) -> None:
        slowest = slow_process(messages)
        if slowest is None:
            return
        others = statistics.median_low(m.own for m in messages)
        self._slow = slowest, others
        if time.monotonic() - self._announced >= ANNOUNCED_EVERY:
            self._announced = time.monotonic()
            log0(
                f"{slowest} is slow: of each step it spends {slowest.own:.3g} s on work of its own, the median process "
                f"{others:.3g} s"
            )


def slow_process(messages: list[Message]) -> Message | None:
    """The process whose own work takes longest, if the others must wait for it."""
    slowest = max(messages, key=lambda m: m.own, default=None)
    if slowest is None or len(messages) < 2 or not all(m.step_time for m in messages):
        return None
    typical = statistics.median_low(m.own for m in messages)
    matters = slowest.own > SLOW * typical and slowest.own - typical > OF_STEP * slowest.step_time
    return slowest if matters else None


def blamed(first: dict[int, Message], second: dict[int, Message]) -> str:
    """Compares what all processes told at two times: those that were silent in between are named, or else those that
    do something else than most."""
    silent = [m for i, m in sorted(second.items()) if i in first and first[i].count == m.count]
    if silent:
        return "; ".join(f"{m} does not answer, it was last at {m.doing}" for m in silent[:5])
    common = Counter(m.doing for m in second.values()).most_common(1)[0]
    others = [m for _, m in sorted(second.items()) if m.doing != common[0]]
    if not others or common[1] <= len(others):
        return "; ".join(f"{m} is at {m.doing}" for _, m in sorted(second.items())[:5]) if others else ""
    return "; ".join(f"{m} is at {m.doing}, most are at {common[0]}" for m in others[:5])


def _read() -> dict[int, Message]:
    found = (Message(**json.loads(text)) for _, text in client().key_value_dir_get(KEY))
    return {message.process: message for message in found}


def _answer(call: Call, began: float) -> dict[int, Message]:
    """What a call of `_read` gives; nothing if it takes longer than `ANSWER`, or fails."""
    call.ended.wait(max(began + ANSWER - time.monotonic(), 0))
    return call.result if call.succeeded else {}
