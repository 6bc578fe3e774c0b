"""uvicorn's HTTP connection with what it lacks: seconds for headers, for reading a reply, and a number of connections;
and errors as JSON."""

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mythos_jax.server.errors import ApiError

MOST_HEADERS = 100  # of a request; `Gate` looks at them
_PIECE = 8192  # bytes that are read at a time
_MOST_AHEAD = 16384  # bytes of the next request


@dataclass(frozen=True)
class ConnectionLimits:
    """connections: at the same time. header_seconds: from the first byte of a request, or of a connection, to the end
    of its headers. stall_seconds: for which a client may leave a reply unread. idle_seconds: between two requests."""

    connections: int = 2048
    header_seconds: float = 10.0
    stall_seconds: float = 30.0
    idle_seconds: int = 15


def guarded(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """The class that uvicorn is to make for every connection."""
    return type("Guarded", (_Guarded,), {"limits": limits})


class _Guarded(H11Protocol):
    limits: ConnectionLimits
    _headers_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # The transport then says at once when the client does not read.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, f"{self.limits.connections} connections are open", retry_after=1))
            return
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        # In pieces: h11 looks at the size of headers only where they have not ended.
        for start in range(0, len(data), _PIECE):
            if not self.transport.is_closing():
                super().data_received(data[start : start + _PIECE])
        if self._is_waited_for():
            self._wait_for_headers()
        else:
            self._cancel_headers_timer()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) > _MOST_AHEAD:
            self._refuse(ApiError(400, f"more than {_MOST_AHEAD} bytes after a request, before its answer"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_headers_timer()
        self._cancel_stall_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_stall_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are no HTTP."""
        self._refuse(ApiError(400, msg))

    def _is_waited_for(self) -> bool:
        """Whether a request has begun whose headers, or whose body after its answer, are not all here."""
        answered = self.cycle is not None and self.cycle.response_complete
        return self.conn.their_state is h11.IDLE or (self.conn.their_state is h11.SEND_BODY and answered)

    def _wait_for_headers(self) -> None:
        if self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self.limits.header_seconds, self._too_late)

    def _too_late(self) -> None:
        self._headers_timer = None
        if self._is_waited_for() and not self.transport.is_closing():
            self._refuse(ApiError(408, f"headers: not here after {self.limits.header_seconds:g} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """Answers without the application, unless it has begun to, and closes the connection."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            response = error.response()
            headers = [(name, value) for name, value in response.raw_headers if name != b"connection"]
            lines = [b"HTTP/1.1 %d %s" % (error.status, STATUS_PHRASES[error.status])]
            lines += [name + b": " + value for name, value in headers]
            self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", bytes(response.body)]))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the application still says goes nowhere
            self.cycle.message_event.set()
        self.transport.close()

    def _cancel_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
