"""Replies on their way: server-sent events, whole replies, and clients that leave."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mythos_jax.server.choices import Choices
from mythos_jax.server.errors import ApiError, Json, to_json
from mythos_jax.server.shapes import Writer

GONE = 499  # what the log and the metrics say of a client that has left; nobody gets to see it
_COMMENT = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A stream of events. When the client leaves, `events` is cancelled at once; `done` is called in any case."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], done: Callable[[], None]):
        self._events, self._done = events, done
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(self._send_all(send), receive)
        finally:
            self._done()

    async def _send_all(self, send: Send) -> None:
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Awaitable[None], receive: Receive) -> bool:
    """Does some work, or cancels it as soon as the client has left; whether it was done."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished = task.done()
        for other in (task, gone):
            other.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone
        if not finished:
            with contextlib.suppress(asyncio.CancelledError):
                await task
    if finished:
        task.result()
    return finished


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def stream(choices: Choices, writer: Writer, done: Callable[[], None]) -> EventStream:
    return EventStream(_events(choices, writer), done)


async def _events(choices: Choices, writer: Writer) -> AsyncIterator[bytes]:
    if opening := writer.opening():
        yield b"".join(map(_event, opening))
    try:
        async for news in choices.pieces():
            if data := _COMMENT if news is None else b"".join(map(_event, writer.piece(*news))):
                yield data
    except ApiError as error:
        choices.close()  # now: a client that does not read lets this event wait
        yield _event(error.body)
        return
    yield b"".join(map(_event, writer.closing())) + _DONE


def _event(content: object) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


async def whole(request: Request, choices: Choices, writer: Writer) -> Response:
    """The reply in one, when all its choices have ended. Raises ApiError."""

    async def collect() -> None:
        async for news in choices.pieces():
            if news is not None:
                choice, piece = news
                choice.pieces.append(piece)

    if await unless_gone(collect(), request.receive):
        return Json(writer.reply())
    return Response(status_code=GONE)
