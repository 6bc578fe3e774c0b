"""Running the server: from the socket it listens on to its end."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from mythos_jax.errors import DONE, FAILED, INTERRUPTED, ConfigError
from mythos_jax.server.app import create_app
from mythos_jax.server.protocol import ConnectionLimits, guarded
from mythos_jax.server.service import Service
from mythos_jax.serving.request import Finished
from mythos_jax.streams import print_result, say

_GRACE = 2  # seconds for the last answers of a server that ends


def bind(host: str, port: int) -> socket.socket:
    """A socket for `serve`, which has its address from now on. Raises ConfigError if that cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host: got {host!r}, allowed: an address or a name of this machine ({error})") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # without it, another server could have the same address, until both listen
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({reason})") from None
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    service: Service,
    listener: socket.socket,
    start: Callable[[], None],
    drain_seconds: float,
    limits: ConnectionLimits | None = None,
) -> int:
    """Serves until a signal comes or the engine fails. Returns the exit code.

    start: makes the engine ready, in a thread of its own, while requests are told to come again.
    """
    server = Server(service, limits or ConnectionLimits(), start, drain_seconds, address_of(listener))
    server.run(sockets=[listener])
    # Neither a program that is being compiled nor a text that is being tokenized can be stopped.
    if service.close() or server.is_starting:
        os._exit(server.code)
    return server.code


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT takes no more requests but ends those that it has."""

    def __init__(
        self,
        service: Service,
        limits: ConnectionLimits,
        start: Callable[[], None],
        drain_seconds: float,
        address: str,
    ):
        config = uvicorn.Config(
            create_app(service),
            http=guarded(limits),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=_GRACE,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what it has to say is said here
        self._service, self._drain_seconds, self._address = service, drain_seconds, address
        self._starter = threading.Thread(target=self._make_ready, args=(start,), name="starting", daemon=True)
        self._start_error: Exception | None = None
        self._drain_until: float | None = None
        self.code = DONE

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._starter.start()

    @property
    def is_starting(self) -> bool:
        return self._starter.is_alive()

    def _make_ready(self, start: Callable[[], None]) -> None:
        try:
            start()
        except Exception as error:
            self._start_error = error
            return
        if self._service.state == "starting":
            self._service.state = "ready"
            if self._drain_until is not None:  # a signal came just before
                self._service.state = "draining"
                return
            print_result(f"mythos: serving {self._service.model.names[0]} at {self._address}")

    async def on_tick(self, counter: int) -> bool:
        error = self._service.engine.error or self._start_error
        if error is not None and self._service.state != "failed":
            self._fail(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        if self._drain_until is not None:
            self._drain()
        return await super().on_tick(counter)

    def _fail(self, reason: str) -> None:
        """Ends everything: there is no engine any more."""
        say(f"mythos: the engine has failed: {' '.join(reason.split())}")
        self._service.state, self.code = "failed", FAILED
        self._service.end_all(Finished("failed", reason))
        self.should_exit = True

    def _drain(self) -> None:
        """Ends when nothing is under way any more, or when there is no more time."""
        late = time.monotonic() >= (self._drain_until or 0)
        if late and self._service.under_way:
            say(f"mythos: {self._service.under_way} requests have not ended in time and are cut off")
            self._service.end_all(Finished("cancelled"))
        self.should_exit = self.should_exit or late or not self._service.under_way

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once."""
        if self._drain_until is not None or self._service.state == "failed":
            os._exit(INTERRUPTED if sig == signal.SIGINT else FAILED)
        self._drain_until = time.monotonic() + self._drain_seconds
        if self._service.state != "failed":
            self._service.state = "draining"
        with contextlib.suppress(RuntimeError):  # a signal may come while the same stream is written to
            say(f"mythos: {signal.Signals(sig).name}: ending {self._service.under_way} requests")
