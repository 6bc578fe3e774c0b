"""A test double of `serving.engine.Engine`: the same methods, and tokens that are a function of prompt and seed."""

import itertools
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mythos_jax.errors import ConfigError
from mythos_jax.serving.counters import Counters
from mythos_jax.serving.request import BusyError, Event, Finished, Listener, NewToken, Request, TakenBack


@dataclass(eq=False)
class Ticket:
    request: Request
    listener: Listener
    answer: Sequence[int]
    told: int = 0
    cancelled: bool = False
    drafts: list[int] = field(default_factory=list)


def some_answer(request: Request, vocabulary: int = 256) -> list[int]:
    """As many tokens as are asked for, from the prompt and the seed alone."""
    key = zlib.crc32(repr((list(request.tokens), request.seed if request.temperature else 0)).encode())
    return [zlib.crc32(f"{key} {i}".encode()) % vocabulary for i in range(request.max_new_tokens)]


class FakeEngine:
    """answer: the tokens that follow a request. delay: seconds for each step, in which every place gets a token.
    turns: with a semaphore, each step takes one from it, and waits for one; what is cancelled leaves without.

    Depths go from 1 to the request's in turn. Every fifth draft is wrong.
    """

    def __init__(
        self,
        places: int = 4,
        queue: int = 8,
        delay: float = 0.0,
        answer: Callable[[Request], Sequence[int]] = some_answer,
        loops: int = 4,
        max_length: int = 256,
    ):
        self.answer, self.delay, self.loops, self.max_length = answer, delay, loops, max_length
        self.counters = Counters(places=places, pages=64, compiled=3)
        self.error: BaseException | None = None
        self.fail: BaseException | None = None  # what the engine's thread is to fail with, in its next step
        self.cancelled: list[Ticket] = []
        self.turns: threading.Semaphore | None = None
        self._queue_limit, self._queue, self._active = queue, deque[Ticket](), list[Ticket]()
        self._lock, self._wake, self._closing, self._drain = threading.Lock(), threading.Event(), False, True
        self._thread: threading.Thread | None = None

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        for i in range(3):
            time.sleep(self.delay)
            if progress is not None:
                progress(f"program {i + 1} of 3")

    def check(self, request: Request) -> None:
        if not request.tokens:
            raise ConfigError("tokens: got none, allowed: at least one")
        if len(request.tokens) + request.max_new_tokens > self.max_length:
            got = f"{len(request.tokens)} tokens and {request.max_new_tokens} new ones"
            raise ConfigError(f"prompt: got {got}, allowed: at most {self.max_length}, together")
        if request.halting is not None and request.halting.criterion == "act":
            raise ConfigError("halting criterion: got 'act', allowed with readout last: latent, kl")

    def submit(self, request: Request, listener: Listener) -> Ticket:
        self.check(request)
        ticket = Ticket(request, listener, self.answer(request))
        with self._lock:
            if self._closing:
                raise RuntimeError("the engine is closed")
            free = self.counters.places - len(self._active)
            if len(self._queue) >= self._queue_limit + free:
                raise BusyError("the queue is full", retry_after=1.5)
            self._queue.append(ticket)
            self.counters.queued = len(self._queue)
        self._wake.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        self.cancelled.append(ticket)
        self._wake.set()

    def let(self, steps: int = 1) -> None:
        """Gives it so many turns."""
        assert self.turns is not None
        self.turns.release(steps)
        self._wake.set()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="fake engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = True) -> None:
        with self._lock:
            self._closing, self._drain = True, drain
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while not (self._closing and (not self._drain or not (self._active or self._queue))):
                if not self._step():
                    self._wake.wait(0.05)
                    self._wake.clear()
        except BaseException as error:
            self.error = error
            self._end_all(Finished("failed", str(error)))
        else:
            self._end_all(Finished("cancelled"))

    def _step(self) -> bool:
        """A token for every place; false if there is nothing to do."""
        if self.fail is not None:
            raise self.fail
        with self._lock:
            while self._queue and len(self._active) < self.counters.places:
                ticket = self._queue.popleft()
                self.counters.requests_started += 1
                self.counters.prompt_tokens += len(ticket.request.tokens)
                self._active.append(ticket)
            self.counters.occupied, self.counters.queued = len(self._active), len(self._queue)
            waiting = [ticket for ticket in self._queue if ticket.cancelled]
            for ticket in waiting:
                self._queue.remove(ticket)
        for ticket in waiting:
            ticket.listener([Finished("cancelled")])
        if not self._active:
            return bool(waiting)
        held = self.turns is not None and not self.turns.acquire(blocking=False)
        if not held:
            time.sleep(self.delay)
            self.counters.steps += 1
        for ticket in list(self._active):
            if held and not ticket.cancelled:
                continue
            events = self._events(ticket)
            if isinstance(events[-1], Finished):
                self._active.remove(ticket)
                self.counters.requests_finished += 1
                self.counters.occupied = len(self._active)
            ticket.listener(events)
        return not held

    def _events(self, ticket: Ticket) -> list[Event]:
        if ticket.cancelled:
            return [Finished("cancelled")]
        request, i = ticket.request, ticket.told
        events: list[Event] = [self._token(ticket, i, ticket.answer[i], final=True)]
        ticket.told += 1
        self._count(events[0])
        if ticket.answer[i] in request.stop_tokens:
            return [*events, Finished("stop")]
        if ticket.told == len(ticket.answer):
            return [*events, Finished("length")]
        if request.draft_loops is not None:
            events = [
                *self._drafts(ticket, i, bool(ticket.drafts) and ticket.drafts.pop(0) != ticket.answer[i], events)
            ]
        return events

    def _drafts(self, ticket: Ticket, i: int, wrong: bool, events: list[Event]) -> list[Event]:
        """The final token i, after the withdrawal of drafts if it differs from its draft, and drafts behind it."""
        if wrong:
            ticket.drafts = []
            events = [TakenBack(i), *events]
        start = ticket.told + len(ticket.drafts)
        for k in range(start, min(ticket.told + ticket.request.draft_tokens, len(ticket.answer))):
            token = (ticket.answer[k] + 1) % 256 if k % 5 == 4 else ticket.answer[k]
            ticket.drafts.append(token)
            self.counters.drafted += 1
            events.append(self._token(ticket, k, token, final=False))
        return events

    def _token(self, ticket: Ticket, index: int, token: int, final: bool) -> NewToken:
        request = ticket.request
        depth = request.loops or self.loops
        loops = depth if request.halting is None else index % depth + 1
        asked = request.logprobs is not None and final
        others = tuple(((token + k) % 256, -0.5 - k) for k in range(request.logprobs or 0)) if asked else ()
        logprob = -0.5 if asked else None
        at_draft = loops if final else request.draft_loops or 1
        return NewToken(index, token, at_draft, final, logprob, others, time.perf_counter())

    def _count(self, event: Event) -> None:
        assert isinstance(event, NewToken)
        self.counters.tokens += 1
        self.counters.loops += event.loops
        self.counters.token_loops += event.loops
        self.counters.full_loops += self.loops

    def _end_all(self, event: Finished) -> None:
        with self._lock:
            self._closing = True
            left = list(itertools.chain(self._active, self._queue))
            self._active.clear()
            self._queue.clear()
        for ticket in left:
            ticket.listener([event])
