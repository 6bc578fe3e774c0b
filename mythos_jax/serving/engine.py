"""The engine: requests enter, tokens come out, each at a depth of its own, and no one waits for another's depth.

A thread of its own runs turn after turn. In a turn it lets waiting requests in, has chunks of prompts read, and starts
a few steps of all places (serving/step.py); then it reads what the turn before has brought, while the device is at work
on this one. The device is never waited for otherwise.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from mythos_jax.errors import one_line
from mythos_jax.processes import log0
from mythos_jax.runs.load import LoadedModel
from mythos_jax.serving.checks import check_request
from mythos_jax.serving.counters import Counters
from mythos_jax.serving.live import Live, Ticket
from mythos_jax.serving.options import EngineOptions, chunk_size, make_layout, smallest
from mythos_jax.serving.pages import Pages
from mythos_jax.serving.places import Setup
from mythos_jax.serving.prefill import Chunk
from mythos_jax.serving.programs import KIND, RAN, Programs, Report
from mythos_jax.serving.request import BusyError, Event, Finished, Listener, NewToken, Request
from mythos_jax.serving.terms import make_terms, shared_key


class Call(NamedTuple):
    """A call of the device that has not been read yet: the request of each row, None for a row without one."""

    report: Report
    lives: list[Live | None]
    steps: int


class Engine:
    """Serves a model. `warm_up` compiles, `start` begins, `submit` may be called from any thread."""

    def __init__(self, loaded: LoadedModel, options: EngineOptions = EngineOptions()):  # noqa: B008
        """Places weights and cache on the model's mesh. Raises ConfigError for options that cannot be."""
        self.loaded, self.options = loaded, options
        self.layout = make_layout(loaded.config.model, options)
        setup = Setup(loaded.model, loaded.variables)
        self._programs = Programs(setup, self.layout, loaded.mesh, options.loop_cache)
        self._pages = Pages(self.layout.pages, self.layout.page, self.layout.granularity)
        self._free = list(reversed(range(self.layout.places)))
        self._queue: deque[Ticket] = deque()
        self._cancelled: set[Ticket] = set()
        self._live: dict[Ticket, Live] = {}
        self._reading: deque[Live] = deque()  # those with a prompt that is not read yet, the next one first
        self._lacks_pages = False
        self._calls: deque[Call] = deque()
        self._wake = threading.Condition()
        self._closing, self._draining = False, True
        self._thread: threading.Thread | None = None
        self._mean_seconds = 1.0  # of a request, lately
        self.error: BaseException | None = None
        self.counters = Counters(places=self.layout.places, pages=self.layout.pages)

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compiles every program. After it nothing is compiled. progress: is told what is next."""
        self._programs.compile_all(progress or (lambda _: None))
        self.counters.compiled = self._programs.count

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of a device: `weights`, `cache`, and what the `programs` compiled so far need beside."""
        return self._programs.memory

    def check(self, request: Request) -> None:
        """Raises ConfigError for what this engine or its model cannot do."""
        loaded = self.loaded
        check_request(loaded.config.model, loaded.variables, self.layout, self.options, request)

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Puts a request into the queue; `listener` is called in the engine's thread with what happens to it.

        Raises ConfigError, BusyError if too many wait, and RuntimeError if the engine is closed or has failed.
        """
        self.check(request)
        ticket = Ticket(request, listener)
        with self._wake:
            if self._closing or self.error is not None:
                raise RuntimeError("the engine is closed" if self.error is None else "the engine has failed")
            most = self.options.queue + len(self._free)  # those that will not have to wait are not counted
            if len(self._queue) >= most:
                message = f"queue: got {len(self._queue)} waiting requests, allowed: {most}"
                raise BusyError(message, self._seconds_to_wait())
            self._queue.append(ticket)
            self.counters.queued = len(self._queue)
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request: its places are free after the turn that is under way. Does nothing if it has ended."""
        with self._wake:
            self._cancelled.add(ticket)
            self._wake.notify()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, and returns when all have ended: drain lets them finish, else they are cancelled.

        It may be called again, to cancel what is being finished. In a listener it returns at once.
        """
        with self._wake:
            self._draining &= drain
            self._closing = True
            self._wake.notify()
        if self._thread is threading.current_thread():
            return
        if self._thread is not None:
            self._thread.join()
        else:
            self._end_all("cancelled", "")

    def _seconds_to_wait(self) -> float:
        return self._mean_seconds * max(len(self._queue) / self.layout.places, 0.1)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
        except BaseException as error:
            self.error = error
            log0(f"engine: {one_line(error)}")
        self._end_all("failed" if self.error else "cancelled", one_line(self.error) if self.error else "")

    def _wait_for_work(self) -> bool:
        with self._wake:
            while True:
                if self._closing and not self._draining:
                    return False
                if self._queue or self._live or self._calls or self._cancelled:
                    return True
                if self._closing:
                    return False
                self._wake.wait()

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        under_way = len(self._calls)
        self._read_prompts()
        self._step()
        self._hear(under_way if len(self._calls) > under_way else len(self._calls))

    def _drop_cancelled(self) -> None:
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()
            waiting = [ticket for ticket in self._queue if ticket in cancelled]
            for ticket in waiting:
                self._queue.remove(ticket)
            self.counters.queued = len(self._queue)
        for ticket in waiting:
            self._tell(ticket, [Finished("cancelled")])
            self._lacks_pages = False  # the next one may need fewer
        for ticket in cancelled:
            if (live := self._live.get(ticket)) is not None:
                self._end(live, Finished("cancelled"))

    def _admit(self) -> None:
        """Lets requests in, in the order in which they came, as long as there are places and pages."""
        config, layout = self.loaded.config.model, self.layout
        while self._queue and not self._lacks_pages:
            ticket, request = self._queue[0], self._queue[0].request
            places = 1 if request.draft_loops is None else 1 + request.draft_tokens
            if places > len(self._free):
                return
            held = self._pages.allocate(request.tokens, request.capacity, shared_key(config, layout, request))
            if held is None:
                self._lacks_pages = True  # until a request leaves
                return
            ring = [self._free.pop() for _ in range(places)]
            terms = make_terms(config, layout, request, ring[0], held.pages)
            live = Live(ticket, ring, held, terms, held.cached_tokens, time.perf_counter())
            with self._wake:
                self._live[ticket] = live
                self._queue.popleft()
                self.counters.queued = len(self._queue)
            self._reading.append(live)
            self.counters.requests_started += 1
            self._count_use()

    def _read_prompts(self) -> None:
        """Reads a chunk of each prompt in turn, as many tokens as fill the largest chunk: those who wait for their next
        token do not wait for long prompts, and short prompts do not either."""
        budget = self.layout.chunks[-1]
        while self._reading:
            live = self._reading[0]
            if not live.over:
                size = chunk_size(self.layout.chunks, len(live.request.tokens) - live.read)
                if size > budget:
                    return
                budget -= size
                self._read_chunk(live, size)
            self._reading.popleft()
            if not live.over and live.is_reading:
                self._reading.append(live)

    def _read_chunk(self, live: Live, size: int) -> None:
        tokens, start = live.request.tokens, live.read
        count = min(len(tokens) - start, size)
        tokens_C, ring_P = np.zeros(size, np.int32), np.full(self.layout.places, self.layout.places, np.int32)
        tokens_C[:count], ring_P[: len(live.ring)] = tokens[start : start + count], live.ring
        numbers = np.int32(count), np.int32(start), np.bool_(start + count == len(tokens))
        report = self._programs.prefill(Chunk(*cast(Any, (ring_P, live.terms, tokens_C, *numbers))))
        live.read += count
        self._pages.publish(live.held, live.read)
        self._calls.append(Call(report, [live], steps=0))
        self.counters.chunks += 1
        self.counters.prompt_tokens += count

    def _step(self) -> None:
        """Starts a call of steps of all places whose prompts are read."""
        lives = [live for live in self._live.values() if not live.is_reading]
        if not lives:
            return
        rows: list[Live | None] = [live for live in lives for _ in live.ring]
        size = smallest(self.layout.place_buckets, len(rows))
        pace = self._programs.pace[size]
        at_K = np.full(size, self.layout.places, np.int32)
        at_K[: len(rows)] = [place for live in lives for place in live.ring]
        # The device may be as many tokens ahead of what is known here as there are calls, and a ring is ahead of that.
        ahead = sum(call.steps or 1 for call in self._calls) + pace + 1
        longest = max(min(len(x.request.tokens) + x.produced + ahead + len(x.ring), x.request.capacity) for x in lives)
        report = self._programs.steps(at_K, pace, -(-longest // self.layout.page))
        self._calls.append(Call(report, rows, steps=pace))
        self.counters.steps += pace

    def _hear(self, count: int) -> None:
        """Reads what the first calls have brought. Those that were just started, the device is at work on."""
        for _ in range(count):
            call = self._calls.popleft()
            numbers = np.asarray(call.report.numbers)  # waits for the device
            seconds = time.perf_counter()
            if call.steps:
                numbers = numbers[: call.steps]
                self.counters.loops += int(numbers[:, RAN, 0].sum())
            else:
                numbers = numbers[None]
                self.counters.prompt_loops += int(numbers[0, RAN, 0])
            for live, events in self._events(call, numbers, seconds):
                self._count(live, events)
                self._tell(live.ticket, events)
                if live.over:
                    self._mean_seconds += 0.1 * (seconds - live.since - self._mean_seconds)
                    self._leave(live)

    def _events(self, call: Call, numbers: np.ndarray, seconds: float) -> list[tuple[Live, list[Event]]]:
        """What a call has brought for each request that is still there. numbers: as in `Report`, [steps, 7, K]."""
        kinds = numbers[:, KIND]
        steps, rows = np.nonzero(kinds)
        # Step by step, and final tokens first: they decide about the drafts of the same step.
        order = np.lexsort((kinds[steps, rows], steps))
        steps, rows = steps[order], rows[order]
        news: dict[Live, list[Event]] = {}
        for step, row, (kind, *rest) in zip(
            steps.tolist(), rows.tolist(), numbers[steps, :RAN, rows].tolist(), strict=True
        ):
            live = call.lives[row]
            if live is not None and not live.over:
                index = (step, row) if call.steps else (row,)
                news.setdefault(live, []).extend(live.take(call.report, index, kind, rest, seconds))
        return list(news.items())

    def _count(self, live: Live, events: list[Event]) -> None:
        counters, depth = self.counters, self.layout.loops(self.loaded.config.model, live.request.loops)
        for event in events:
            if isinstance(event, NewToken) and event.final:
                counters.tokens += 1
                counters.token_loops += event.loops
                counters.full_loops += depth
        counters.drafted += live.drafted
        counters.accepted += live.accepted
        live.drafted = live.accepted = 0

    def _tell(self, ticket: Ticket, events: list[Event]) -> None:
        try:
            ticket.listener(events)
        except Exception as error:  # a listener's fault must not stop the others
            log0(f"engine: the listener of request {ticket.number} failed: {one_line(error)}")
            self.cancel(ticket)

    def _end(self, live: Live, last: Finished) -> None:
        """Ends a request that has not come to its own end."""
        self._leave(live)
        self._tell(live.ticket, [*live.take_back(live.produced), last])

    def _leave(self, live: Live) -> None:
        """Frees what a request has. Calls that are under way may still bring news of it, which nobody wants."""
        live.over = True
        del self._live[live.ticket]
        self._free.extend(reversed(live.ring))
        self._pages.release(live.held)
        self._lacks_pages = False
        self.counters.requests_finished += 1
        self._count_use()

    def _count_use(self) -> None:
        self.counters.occupied = self.layout.places - len(self._free)
        self.counters.pages_used = self._pages.used
        self.counters.cached_tokens = self._pages.cached_tokens

    def _end_all(self, reason: Literal["cancelled", "failed"], message: str) -> None:
        with self._wake:
            self._closing = True
            waiting, lives = list(self._queue), list(self._live.values())
            self._queue.clear()
        for live in lives:
            self._end(live, Finished(reason, message))
        for ticket in waiting:
            self._tell(ticket, [Finished(reason, message)])
