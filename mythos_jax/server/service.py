"""The server's state: the engine, the model, the limits, and the requests that are under way."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from mythos_jax.errors import one_line
from mythos_jax.server.errors import ApiError
from mythos_jax.server.inbox import Bell, Inbox
from mythos_jax.server.limits import Buffered, Limits
from mythos_jax.server.metrics import Metrics
from mythos_jax.server.model import Defaults, ServedModel
from mythos_jax.serving.request import Finished, Listener, Request

Result = TypeVar("Result")
State = Literal["starting", "ready", "draining", "failed"]
_RETRY_AFTER = 5.0  # seconds, of a server that starts or stops


class EngineLike(Protocol):
    """What the server needs of `serving.engine.Engine`."""

    error: BaseException | None

    @property
    def counters(self) -> Any: ...

    def check(self, request: Request) -> None: ...

    def submit(self, request: Request, listener: Listener) -> Any: ...

    def cancel(self, ticket: Any) -> None: ...


@dataclass
class Service:
    """key: what clients must send as a bearer token; None: nothing. origins: of pages that may ask from a browser.

    local: only this machine reaches it, under the name localhost or an address. debug: the log has the traceback of
    an error of the server.
    """

    engine: EngineLike
    model: ServedModel
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    key: str | None = None
    origins: Sequence[str] = ()
    state: State = "ready"
    local: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self.inboxes: set[Inbox] = set()
        self.buffered = Buffered(self.limits.buffered)
        self._bell: Bell | None = None
        # One thread: a tokenizer is not made for several at a time, and large bodies take much memory.
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self._works: set[Future[Any]] = set()
        self._reading = 0

    def require_ready(self) -> None:
        """Raises ApiError if it takes no requests now."""
        if self.failed:
            raise ApiError(503, f"the engine has failed: {self.failed}", code="engine_failed")
        if self.state != "ready":
            reason = "starting" if self.state == "starting" else "stopping"
            raise ApiError(503, f"the server is {reason}", code=f"server_{reason}", retry_after=_RETRY_AFTER)

    @property
    def failed(self) -> str:
        """Why the engine has failed; empty if it has not."""
        error = self.engine.error
        if error is None and self.state != "failed":
            return ""
        return one_line(error or "unknown", 300)

    async def aside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Does something that takes long in a thread of its own, one after the other: reads large bodies, makes tokens
        of texts."""
        self._reading += 1
        try:
            future = self._aside.submit(work, *arguments)
            self._works.add(future)
            future.add_done_callback(self._works.discard)
            return await asyncio.wrap_future(future)
        finally:
            self._reading -= 1  # the request goes on, without a pause, to the next text or to its inbox

    @property
    def under_way(self) -> int:
        """Requests that have been taken and have not ended: that are being tokenized, or wait for events."""
        return self._reading + len(self.inboxes)

    def close(self) -> bool:
        """Lets nothing begin aside any more. Whether something is still being done, for which Python's end would wait.

        For when the event loop has ended."""
        self._aside.shutdown(wait=False, cancel_futures=True)
        return bool(self._works)

    def inbox(self, choices: int) -> Inbox:
        """For a request that comes now."""
        if self._bell is None or self._bell.loop is not asyncio.get_running_loop():
            self._bell = Bell()
        return Inbox(self._bell, choices)

    def end_all(self, event: Finished) -> None:
        """Ends every request that is under way. For the thread of the event loop."""
        for inbox in list(self.inboxes):
            inbox.end(event)
