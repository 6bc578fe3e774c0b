"""What the engine adds to its device program: seconds per step when it serves, and of the bare program in a loop."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from mythos_jax.serving.engine import Engine
from mythos_jax.serving.options import smallest
from mythos_jax.serving.request import Event, NewToken, Request

EDGE = 3  # tokens at the beginning and at the end of replies that are not timed: not all requests are there
FIRST = 4  # calls of the bare program that are not timed


def equal_requests(request: Request, users: int, room: int) -> list[Request]:
    """Requests that go through all their loops side by side: as many places are busy in all of the timed steps."""
    new = room - len(request.tokens)
    return [replace(request, halting=None, temperature=0.0, max_new_tokens=new, seed=i) for i in range(users)]


def served(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds per step of a started engine, from the thread that asks to the one that hears."""
    marks: list[tuple[float, int]] = []
    ended, left = threading.Event(), len(requests)
    last = requests[-1].max_new_tokens - 1

    def listen(events: Sequence[Event], is_last: bool) -> None:
        nonlocal left
        for event in events:
            if not isinstance(event, NewToken):
                left -= 1
                if not left:
                    ended.set()
            elif is_last and event.index in (EDGE, last - EDGE):
                marks.append((event.seconds, engine.counters.steps))

    for i, request in enumerate(requests):
        is_last = i == len(requests) - 1
        engine.submit(request, lambda events, is_last=is_last: listen(events, is_last))
    if not ended.wait(timeout=600):
        raise RuntimeError("the engine has not answered for ten minutes")
    (start, before), (end, after) = marks
    return (end - start) / (after - before)


def bare(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds per step of the program of an engine that was not started, on places in the state that the requests
    bring them into: calls of as many steps as when it serves, one after the other; nothing is read."""
    tickets = [engine.submit(request, lambda events: None) for request in requests]
    while len(engine._live) < len(requests) or any(live.is_reading for live in engine._live.values()):
        engine._turn()
    engine._hear(len(engine._calls))
    places = [place for live in engine._live.values() for place in live.ring]
    size, pages = smallest(engine.layout.place_buckets, len(places)), engine.layout.row_pages
    at, pace = np.full(size, engine.layout.places, np.int32), engine._programs.pace[size]
    at[: len(places)] = places
    left = min(live.request.capacity - len(live.request.tokens) - live.produced for live in engine._live.values())
    calls = (requests[0].loops or 1) * (left - 1) // pace - FIRST
    for _ in range(FIRST):
        report = engine._programs.steps(at, pace, pages)
    jax.block_until_ready(report)
    start = time.perf_counter()
    for _ in range(calls):
        report = engine._programs.steps(at, pace, pages)
    jax.block_until_ready(report)
    seconds = time.perf_counter() - start
    for ticket in tickets:
        engine.cancel(ticket)
    engine._turn()
    engine._hear(len(engine._calls))
    return seconds / (calls * pace)
