"""Threads that do long work, which a Ctrl-C does not wait for."""

import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self

from mythos_jax.errors import INTERRUPTED
from mythos_jax.interrupts import TURN

_PATIENCE = 1.0  # seconds that an interrupted program waits for its threads


class Workers:
    """A context in which `submit` runs calls in `count` threads, in order.

    After an error it waits for the calls that were submitted, so that their work is not lost. After a Ctrl-C or a
    SystemExit it does not: calls that look at `stopped` end themselves, and a call into a library ends with the
    program. (`ThreadPoolExecutor` waits for its threads in any case, even at the end of the program.)
    """

    def __init__(self, count: int):
        self.count = count
        self.stopped = threading.Event()
        self._calls: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        self._calls.put((future, function, arguments))
        return future

    def result(self, future: Future) -> Any:
        """What a submitted call returned or raised."""
        while not future.done():
            wait([future], timeout=TURN)
        return future.result()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _ in self._threads:
            self._calls.put(None)
        if error is not None and not isinstance(error, Exception):
            self._abandon(error)
            return
        try:
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(TURN)
        except BaseException as interruption:
            self._abandon(interruption)
            raise

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if self.stopped.is_set():
                future.cancel()
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

    def _abandon(self, error: BaseException) -> None:
        self.stopped.set()
        # A thread that comes back from a library while Python shuts down would abort the process.
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else INTERRUPTED
        atexit.register(self._leave, code)
        end = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))

    def _leave(self, code: int) -> None:
        """Ends the process, if a thread is still at work."""
        if any(thread.is_alive() for thread in self._threads):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
