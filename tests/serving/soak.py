"""An engine under random load: every request ends once, nothing is lost, nothing compiles, and memory stays flat.

    JAX_PLATFORMS=cpu python -m tests.serving.soak --minutes 60 [--seed 0]

Clients in threads of their own send requests of every kind, cancel some at any moment, and listen to some no more. In
rounds they all stop, and what is left is counted. `tests/serving/test_soak.py` is a short version.
"""

import argparse
import contextlib
import gc
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from mythos_jax.errors import ConfigError
from mythos_jax.model.halting import Halting
from mythos_jax.serving.options import EngineOptions
from mythos_jax.serving.request import BusyError, Event, Finished, Request, TakenBack
from tests.serving.engines import LENGTH, THRESHOLDS, started
from tests.tiny import OURO, V

MODEL = OURO  # follows every criterion but ACT's and the predictor's
CRITERIA = [name for name in THRESHOLDS if name != "act"]
CLIENTS = 3
PATIENCE = 60.0  # seconds without a token, a part of a prompt or an end, until what is awaited counts as lost


class Listener:
    """Hears what becomes of a request, and what is wrong with it. vanishes: raises, from the second call on."""

    def __init__(self, request: Request, vanishes: bool):
        self.request, self.vanishes = request, vanishes
        self.tokens: list[int] = []
        self.drafts: dict[int, int] = {}
        self.finished: list[Finished] = []
        self.wrong: list[str] = []
        self.calls = 0

    def __call__(self, events: Sequence[Event]) -> None:
        self.calls += 1
        for event in events:
            if problem := self.problem(event):
                self.wrong.append(f"{problem}: {event}")
            self.take(event)
        if self.vanishes and self.calls > 1:
            raise ConnectionError("the listener is gone")

    def problem(self, event: Event) -> str:
        """What may not follow what was heard before; "" if it may."""
        request, count = self.request, len(self.tokens)
        if self.finished:
            return "after the end"
        if isinstance(event, TakenBack):
            return "" if any(index >= event.index for index in self.drafts) else "no such draft"
        if isinstance(event, Finished):
            complete = count == request.max_new_tokens
            stopped = count > 0 and self.tokens[-1] in request.stop_tokens
            right = {"length": complete and not stopped, "stop": stopped, "cancelled": True}.get(event.reason, False)
            left = bool(self.drafts) and event.reason != "cancelled"
            return "not the reason" if not right else "drafts are left" if left else ""
        if event.final and event.index != count:
            return f"not token {count}"
        if event.final and self.drafts.get(count, event.token) != event.token:
            return "another token than its draft, which was not taken back"
        if not event.final and event.index != count + len(self.drafts):
            return f"not draft {count + len(self.drafts)}"
        if event.index >= request.max_new_tokens or not 1 <= event.loops <= (request.loops or MODEL.loops):
            return "more than was asked for"
        reported = None if event.logprob is None else len(event.alternatives)
        if event.final and reported != request.logprobs:
            return "not the log-probabilities that were asked for"
        return ""

    def take(self, event: Event) -> None:
        if isinstance(event, TakenBack):
            self.drafts = {index: token for index, token in self.drafts.items() if index < event.index}
        elif isinstance(event, Finished):
            self.finished.append(event)
        elif event.final:
            self.drafts.pop(event.index, None)
            self.tokens.append(event.token)
        else:
            self.drafts[event.index] = event.token


def some_request(draw: random.Random) -> Request:
    """With every option; some begin alike."""
    start = draw.choice([0, 0, 16, 32])
    prompt = [7 * i * i % V for i in range(start)] + draw.choices(range(V), k=draw.randint(1, 20))
    loops = draw.choice([None, 1, 2, MODEL.loops])
    criterion = draw.choice([None, *CRITERIA])
    halting = None
    if criterion is not None:
        threshold = draw.choice([None, THRESHOLDS[criterion]])
        halting = Halting(criterion, threshold, draw.choice([1, 1, 2]), draw.choice([None, None, 2]))
    drafts = draw.random() < 0.3 and not (halting is not None and halting.reads_logits)
    return Request(
        tokens=prompt,
        max_new_tokens=draw.randint(1, draw.choice([4, 12, LENGTH - len(prompt)])),
        loops=loops,
        halting=halting,
        temperature=draw.choice([0.0, 0.7, 1.5]),
        top_k=draw.choice([0, 0, 5]),
        top_p=draw.choice([1.0, 0.9]),
        seed=draw.randrange(2**31),
        stop_tokens=draw.sample(range(V), k=draw.choice([0, 0, 1, 3])),
        logprobs=draw.choice([None, None, 0, 3]),
        draft_loops=draw.randint(1, loops or MODEL.loops) if drafts else None,
        draft_tokens=draw.randint(1, 3),
    )


REFUSED = [
    Request([], 4),
    Request([1] * LENGTH, 1),
    Request([V], 1),
    Request([1], 0),
    Request([1], 1, loops=MODEL.loops + 1),
    Request([1], 1, temperature=-1.0),
    Request([1], 1, halting=Halting("act")),
    Request([1], 4, draft_loops=1, halting=Halting("kl")),
]


@dataclass
class Tally:
    """What the clients have seen. different: replies to a request that had another reply before."""

    requests: int = 0
    busy: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    repeated: int = 0
    different: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, listener: Listener) -> None:
        self.requests += 1
        self.wrong += listener.wrong
        if len(listener.finished) != 1:
            self.wrong.append(f"ended {len(listener.finished)} times: {listener.request}")
        for event in listener.finished:
            self.reasons[event.reason] = self.reasons.get(event.reason, 0) + 1

    def add_all(self, other: "Tally") -> None:
        self.requests += other.requests
        self.busy += other.busy
        self.refused += other.refused
        self.repeated += other.repeated
        self.different += other.different
        self.wrong += other.wrong
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count


class Patience:
    """Whether it makes sense to wait for the engine: a machine may be busy, so that only standing still counts."""

    def __init__(self, counters: Any):
        self.counters, self.seen, self.since = counters, (-1, -1, -1), 0.0

    def lasts(self) -> bool:
        now = self.counters.tokens, self.counters.prompt_tokens, self.counters.requests_finished
        if now != self.seen:
            self.seen, self.since = now, time.monotonic()
        return time.monotonic() < self.since + PATIENCE


class Client:
    """Sends requests, at most `ahead` before it hears the end of one, and waits for their ends."""

    def __init__(self, engine: Any, draw: random.Random, known: dict[int, tuple[Request, list[int]]], ahead: int):
        self.engine, self.draw, self.known, self.ahead = engine, draw, known, ahead
        self.tally = Tally()
        self.waiting: list[tuple[Any, Listener, int | None]] = []

    def run(self, count: int) -> None:
        sent = 0
        while sent < count:
            if len(self.waiting) < self.ahead:
                self.send()
                sent += 1
            if self.draw.random() < 0.05 and self.waiting:
                self.engine.cancel(self.draw.choice(self.waiting)[0])  # may have ended
            time.sleep(self.draw.choice([0, 0, 0.002, 0.02]))
            self.collect()
        patience = Patience(self.engine.counters)
        while self.waiting and patience.lasts():
            time.sleep(0.01)
            self.collect()
        self.tally.wrong += [f"never ended: {listener.request}" for _, listener, _ in self.waiting]

    def send(self) -> None:
        draw = self.draw
        if draw.random() < 0.02:
            request = draw.choice(REFUSED)
            try:
                self.engine.submit(request, self.tally.wrong.append)
            except ConfigError:
                self.tally.refused += 1
            else:
                self.tally.wrong.append(f"accepted: {request}")
            return
        number = draw.randrange(8) if draw.random() < 0.2 else None
        request = some_request(draw) if number is None else self.known[number][0]
        listener = Listener(request, vanishes=number is None and draw.random() < 0.05)
        try:
            ticket = self.engine.submit(request, listener)
        except BusyError as error:
            self.tally.busy += 1
            time.sleep(min(error.retry_after, 0.05))
            return
        self.waiting.append((ticket, listener, number))
        if draw.random() < 0.03:
            self.engine.cancel(ticket)

    def collect(self) -> None:
        ended = [entry for entry in self.waiting if entry[1].finished]
        self.waiting = [entry for entry in self.waiting if not entry[1].finished]
        for _, listener, number in ended:
            self.tally.add(listener)
            if number is not None:
                self.compare(listener, self.known[number][1])

    def compare(self, listener: Listener, before: list[int]) -> None:
        """In other company, and from the prefix cache or not, a request has the reply that it had alone."""
        self.tally.repeated += 1
        whole = listener.finished[0].reason != "cancelled"
        if listener.tokens != (before if whole else before[: len(listener.tokens)]):
            self.tally.different.append(f"{listener.request}: {listener.tokens}, alone {before}")


@dataclass(frozen=True)
class Sample:
    """What is there while no request is. rss: MiB. objects: that Python's collector knows of."""

    requests: int
    rss: float
    arrays: int
    array_bytes: int
    objects: int
    threads: int
    compiled: int

    def __str__(self) -> str:
        return (
            f"{self.requests:8,} requests  RSS {self.rss:7.1f} MiB  {self.arrays} arrays, {self.array_bytes:,} bytes  "
            f"{self.objects:,} objects  {self.threads} threads  {self.compiled} compilations"
        )


def measure(requests: int, compiled: int) -> Sample:
    gc.collect()
    arrays = jax.live_arrays()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        requests,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(arrays),
        sum(x.nbytes for x in arrays),
        len(gc.get_objects()),
        threading.active_count(),
        compiled,
    )


class Soak:
    """engine: of MODEL, started, its programs compiled. ahead: requests of each client that are under way, at most."""

    def __init__(self, engine: Any, seed: int = 0, ahead: int = 4):
        self.engine, self.draw, self.ahead = engine, random.Random(seed), ahead
        self.total = Tally()
        self.samples: list[Sample] = []
        self.compiled: list[str] = []
        self.arrays = len(jax.live_arrays())
        self.known = {number: self.alone(number) for number in range(8)}

    @contextlib.contextmanager
    def listening(self) -> Iterator["Soak"]:
        """Inside, it hears what jax traces and compiles."""

        def hear(event: str, seconds: float, **_: Any) -> None:
            if event.startswith("/jax/core/compile/"):
                self.compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(hear)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(hear)

    def alone(self, number: int) -> tuple[Request, list[int]]:
        request = some_request(self.draw)
        listener = Listener(request, vanishes=False)
        self.engine.submit(request, listener)
        while not listener.finished:
            time.sleep(0.001)
        return request, listener.tokens

    def round(self, count: int) -> Sample:
        """So many requests of each client, and what is left afterwards."""
        clients = [
            Client(self.engine, random.Random(self.draw.random()), self.known, self.ahead) for _ in range(CLIENTS)
        ]
        threads = [threading.Thread(target=client.run, args=[count], daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            self.total.add_all(client.tally)
        self.check_idle()
        self.samples.append(measure(self.total.requests, len(self.compiled)))
        return self.samples[-1]

    def check_idle(self) -> None:
        """No place, no page and no array is held by anyone, a moment after the last request has ended. (A step may
        have begun before the end was known.)"""
        counters, patience = self.engine.counters, Patience(self.engine.counters)
        while any(self.held(counters)) and patience.lasts():
            time.sleep(0.005)
        while len(jax.live_arrays()) > self.arrays and patience.lasts():
            time.sleep(0.05)
        assert not any(self.held(counters)), f"{counters}\n{self.total.wrong[:3]}"
        assert self.engine.error is None, self.engine.error

    @staticmethod
    def held(counters: Any) -> tuple[int, ...]:
        ended = counters.requests_started - counters.requests_finished
        return counters.occupied, counters.queued, counters.pages_used, ended

    def check(self, warm: int, rss_growth: float) -> None:
        """warm: rounds until all caches are full. rss_growth: MiB that may come after that."""
        total, (first, *rest) = self.total, self.samples[warm - 1 :]
        assert not total.wrong, total.wrong[:3]
        assert not total.different, total.different[:3]
        assert rest
        for sample in rest:
            assert (sample.arrays, sample.array_bytes) == (self.arrays, first.array_bytes), f"{first}\n{sample}"
            assert sample.threads == first.threads, f"{first}\n{sample}"
            assert sample.rss < first.rss + rss_growth, f"{first}\n{sample}"
        # What is kept for each request, or for every tenth, would be more.
        more = rest[-1].objects - first.objects
        assert more < 100 + (rest[-1].requests - first.requests) / 20, f"{first}\n{rest[-1]}"
        assert not self.compiled, self.compiled


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.serving.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--round", type=int, default=300, metavar="N", help="requests of a client (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.getLogger("mythos_jax").setLevel(logging.ERROR)  # it says of each listener that it is gone
    engine = started(MODEL, EngineOptions(places=8, queue=8))
    soak = Soak(engine, arguments.seed, ahead=8)  # more than there are places and room in the queue
    end = time.monotonic() + 60 * arguments.minutes
    with soak.listening():
        while time.monotonic() < end:
            print(soak.round(arguments.round), flush=True)
    total = soak.total
    print(f"{total.reasons}, {total.busy} busy, {total.refused} refused, {total.repeated} repeated")
    print(engine.counters)
    for text in [*total.wrong[:20], *total.different[:20]]:
        print(text)
    soak.check(warm=max(1, len(soak.samples) // 4), rss_growth=10)
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
