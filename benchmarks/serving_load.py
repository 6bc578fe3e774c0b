"""The load of the serving benchmark: which requests are sent and when, and what is noted of their replies."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mythos_jax.model.halting import Halting
from mythos_jax.serving.request import Event, Finished, NewToken, Request, TakenBack

Send = Callable[[Request, Any], object]  # the second is called with what comes, as a `Listener`
WAIT = 600.0  # seconds without a reply after which a side has failed


class Range(NamedTuple):
    """From the first number to the last, drawn so that every octave is equally likely."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Range":
        first, _, last = text.partition("-")
        return cls(int(first), int(last or first))

    def draw(self, random: np.random.Generator) -> int:
        return int(np.exp(random.uniform(np.log(self.first), np.log(self.last + 1))))


@dataclass(frozen=True)
class Mix:
    """What requests are drawn from; each is drawn on its own."""

    prompt: Range  # tokens
    new: Range
    loops: int
    policies: tuple[Halting | None, ...]
    temperatures: tuple[float, ...]


def draw_requests(text: np.ndarray, mix: Mix, count: int, seed: int) -> list[Request]:
    """`count` requests whose prompts are pieces of the text, int32 [N]; the same for the same seed."""
    random = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        length = min(mix.prompt.draw(random), len(text))
        start = int(random.integers(0, len(text) - length + 1))
        policy = mix.policies[random.integers(len(mix.policies))]
        requests.append(
            Request(
                tokens=text[start : start + length].tolist(),
                max_new_tokens=mix.new.draw(random),
                loops=mix.loops,
                halting=policy,
                temperature=mix.temperatures[random.integers(len(mix.temperatures))],
                seed=i,
            )
        )
    return requests


def arrivals(count: int, rate: float, seed: int) -> np.ndarray:
    """Seconds after the start at which requests arrive: a Poisson process of `rate` requests a second."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


@dataclass(frozen=True)
class Counted:
    """How many new tokens there were, as a server that does not send them one by one says at the end."""

    tokens: int


@dataclass
class Reply:
    """What is noted of one reply. Times are of `time.perf_counter`.

    due: when the request was to be sent. times, loops, tokens: of each final token; a token's loops are None if the
    server does not tell. first_shown: of the first token, draft or final. ahead: seconds for which each token that was
    shown as a draft waited to be confirmed. count: new tokens, if it differs from those that could be timed.
    """

    due: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    loops: list[int | None] = field(default_factory=list)
    first_shown: float | None = None
    ended: float | None = None
    reason: str = ""
    ahead: list[float] = field(default_factory=list)
    count: int | None = None
    _drafts: dict[int, tuple[int, float]] = field(default_factory=dict)  # index -> token and time

    def note(self, events: Sequence[Event | Counted], now: float) -> bool:
        """Notes what came; true if the reply is complete."""
        for event in events:
            if isinstance(event, NewToken):
                self._note_token(event, event.seconds or now)  # of a server elsewhere: when this machine read it
            elif isinstance(event, TakenBack):
                self._drafts = {index: draft for index, draft in self._drafts.items() if index < event.index}
            elif isinstance(event, Counted):
                self.count = event.tokens
            elif isinstance(event, Finished):
                self.ended, self.reason = now, event.reason
                if event.reason not in ("stop", "length"):
                    raise RuntimeError(f"a request ended with {event.reason}: {event.message}")
                return True
        return False

    def _note_token(self, event: NewToken, seconds: float) -> None:
        self.first_shown = seconds if self.first_shown is None else self.first_shown
        if not event.final:
            self._drafts[event.index] = event.token, seconds
            return
        token, shown = self._drafts.pop(event.index, (None, 0.0))
        if token == event.token:
            self.ahead.append(seconds - shown)
        self.times.append(seconds)
        self.tokens.append(event.token)
        self.loops.append(event.loops or None)

    @property
    def new_tokens(self) -> int:
        return len(self.times) if self.count is None else self.count


class Load:
    """Sends requests to one side and waits for their replies."""

    def __init__(self, send: Send, requests: Sequence[Request]):
        self._send, self._requests = send, requests
        self._ended: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self._replies: list[Reply | None] = [None] * len(requests)

    @property
    def finished(self) -> list[Reply]:
        """The replies, in the order of the requests."""
        return [reply for reply in self._replies if reply is not None]

    def closed(self, users: int) -> float:
        """`users` users, each of whom sends the next request when an answer is there. Returns seconds."""
        start, numbers = time.perf_counter(), iter(range(len(self._requests)))
        for _ in range(users):
            self._next(numbers)
        for _ in self._requests:
            self._wait()
            self._next(numbers)
        return time.perf_counter() - start

    def arriving(self, times: Sequence[float] | np.ndarray) -> float:
        """Requests that arrive whether or not there are answers. times: seconds after the start. Returns seconds."""
        start = time.perf_counter()
        for number, after in enumerate(times):
            time.sleep(max(0.0, start + after - time.perf_counter()))
            self._start(number, start + after)
        for _ in self._requests:
            self._wait()
        return time.perf_counter() - start

    def _next(self, numbers: Iterator[int]) -> None:
        number = next(numbers, None)
        if number is not None:
            self._start(number, time.perf_counter())

    def _start(self, number: int, due: float) -> None:
        reply = self._replies[number] = Reply(due)

        def listen(events: Sequence[Event | Counted]) -> None:
            try:
                if reply.note(events, time.perf_counter()):
                    self._ended.put(number)
            except Exception as error:
                self._ended.put(error)

        self._send(self._requests[number], listen)

    def _wait(self) -> None:
        ended = self._ended.get(timeout=WAIT)
        if isinstance(ended, Exception):
            raise ended
