"""A call in a thread of its own, for work that may fail or never end."""

import threading
from collections.abc import Callable
from typing import Any


class Call:
    """Begins at once, and does not keep the program from ending: its thread is a daemon, as those are that it starts.

    ended: set when the call has returned or raised. result, error: what it returned, or raised.
    """

    def __init__(self, work: Callable[[], Any], name: str | None = None):
        """name: of the thread."""
        self.ended = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()

    @property
    def succeeded(self) -> bool:
        return self.ended.is_set() and self.error is None

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except BaseException as error:
            self.error = error
        self.ended.set()
