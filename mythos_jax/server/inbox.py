"""From the engine's thread to the event loop: the events of one HTTP request, for all its choices."""

import asyncio
from collections import deque
from collections.abc import Sequence

from mythos_jax.serving.request import Event, Finished, Listener

# Events that may wait to be read, of a request and for each of its choices; a client that lets more wait is cut off.
MOST_EVENTS, MOST_FOR_EACH = 4000, 200


class Overflow(Exception):
    """The client reads too slowly."""


class Bell:
    """Wakes the readers of all inboxes, with one call from the engine's thread to the event loop for all that happens
    until the loop runs. To be made in the event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Event] = deque()
        self._rung = False

    def ring(self, ready: asyncio.Event) -> None:
        self._waiting.append(ready)
        if not self._rung:
            self._rung = True
            self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._rung = False  # what is appended from here on is seen below, or rings again
        while self._waiting:
            self._waiting.popleft().set()


class Inbox:
    """Holds events until the request's task reads them."""

    def __init__(self, bell: Bell, choices: int = 1, most: int = MOST_EVENTS):
        self._bell, self._most = bell, most + choices * MOST_FOR_EACH
        self._batches: deque[tuple[int, Sequence[Event]]] = deque()  # appended in one thread, taken in the other
        self._ready = asyncio.Event()
        self._came = self._taken = 0  # events; each number is written in one thread alone
        self._woken = self._closed = False

    def listener(self, choice: int) -> Listener:
        """What the engine is to call with the events of one choice."""

        def listen(events: Sequence[Event]) -> None:
            if self._closed:
                return
            self._came += len(events)
            if self._came - self._taken > self._most:
                self._closed = True  # what follows is of no use; the reader finds out by `Overflow`
            self._batches.append((choice, events))
            self._wake()

        return listen

    def end(self, event: Finished) -> None:
        """Says to the reader that everything is over."""
        self._batches.append((-1, [event]))
        self._ready.set()

    def close(self) -> None:
        """Drops what is here, and what will come."""
        self._closed = True
        self._batches.clear()

    async def take(self, seconds: float) -> list[tuple[int, Sequence[Event]]]:
        """All batches that have arrived, at least one; none if nothing comes within some seconds. A choice of -1 stands
        for all. Raises Overflow."""
        try:
            async with asyncio.timeout(seconds):
                while not self._batches:
                    self._ready.clear()
                    self._woken = False  # what is appended from here on is seen below, or wakes
                    if not self._batches:
                        await self._ready.wait()
        except TimeoutError:
            return []
        self._woken = False
        taken = []
        while self._batches:
            taken.append(self._batches.popleft())
        if self._came - self._taken > self._most:
            raise Overflow
        self._taken += sum(len(events) for choice, events in taken if choice >= 0)
        return taken

    def _wake(self) -> None:
        """Wakes the reader, once for all that comes until it reads."""
        if self._woken:
            return
        self._woken = True
        try:
            self._bell.ring(self._ready)
        except RuntimeError:  # the loop has ended
            self._closed = True
