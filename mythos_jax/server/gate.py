"""What every request goes through: the key, errors as JSON, numbers for /metrics, and a line in the log."""

import time
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mythos_jax.errors import one_line
from mythos_jax.server.auth import require_key, require_local_name
from mythos_jax.server.errors import ApiError
from mythos_jax.server.pages import FILES
from mythos_jax.server.protocol import MOST_HEADERS
from mythos_jax.server.service import Service
from mythos_jax.server.streams import GONE
from mythos_jax.streams import log

_OPEN = frozenset({"/", "/health", "/ready", *(f"/{name}" for name in FILES)})  # need no key
_KNOWN = _OPEN | {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/openapi.json"}


class Gate:
    """An ASGI middleware. No exception leaves it."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["accepted"], state["id"], state["summary"] = time.perf_counter(), uuid.uuid4().hex, ""
        status = [0]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("x-request-id", state["id"])
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            await self._answer(scope, receive, noting, status)
        finally:
            self._note(scope, status[0] or GONE)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, status: list[int]) -> None:
        try:
            self._check(scope)
            await self._app(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            if not isinstance(error, ApiError):
                log(f"{scope['state']['id']}: {type(error).__name__}: {one_line(error, 300)}")
                if self._service.debug:
                    traceback.print_exception(error)
                error = ApiError(500, f"an error of the server; its log has it as {scope['state']['id']}")
            if status[0]:
                return  # it has begun to answer, and the connection will end without an end of the answer
            await error.response()(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if len(scope["headers"]) > MOST_HEADERS:
            raise ApiError(431, f"{len(scope['headers'])} headers, allowed: at most {MOST_HEADERS}", close=True)
        headers = Headers(scope=scope)
        if self._service.key is None and self._service.local:
            require_local_name(headers)
        if scope["path"] not in _OPEN:
            require_key(headers, self._service.key)

    def _note(self, scope: Scope, status: int) -> None:
        path = scope["path"] if scope["path"] in _KNOWN else "other"
        self._service.metrics.requests.labels(path, str(status)).inc()
        if path.startswith("/v1/"):
            state = scope["state"]
            seconds = time.perf_counter() - state["accepted"]
            summary = state["summary"] or f"{seconds * 1000:.0f} ms"
            log(f"{state['id']} {scope['method']} {path} {status} {summary}")
