"""What is read of a request before anything is done with it: a body in pieces, up to a limit, within some seconds, and
the JSON in it."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from mythos_jax.server.errors import ApiError

_MOST_KEYS = 1000  # of an object
_FREE = 2**16  # bytes of every body that are not counted, so that a few large ones do not keep out the small
_DISCARDED = 16  # times the limit, of a body that is too large, are read so that the client gets to see the answer

Count = Callable[[int], None]


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request's. body_seconds: in which it must arrive. buffered: bytes of all bodies that arrive, or
    whose texts wait to become tokens, without the first 64 KiB of each. choices: of one request. keep_alive_seconds:
    after which a stream without news gets a comment.
    """

    body: int = 4 * 2**20
    body_seconds: float = 30.0
    buffered: int = 64 * 2**20
    choices: int = 128
    keep_alive_seconds: float = 10.0


@dataclass
class Buffered:
    """The bytes of all bodies that arrive, or whose texts wait to become tokens, without the first ones of each."""

    most: int
    bytes: int = 0

    @contextlib.contextmanager
    def of_a_body(self) -> Iterator[Count]:
        """Gives a function that counts some more bytes until the end of the block, and raises ApiError if these are too
        many."""
        size = counted = 0

        def add(count: int) -> None:
            nonlocal size, counted
            size += count
            more = max(0, size - _FREE) - counted
            if self.bytes + more > self.most:
                raise ApiError(429, "the bodies of too many requests come at once", retry_after=1)
            counted += more
            self.bytes += more

        try:
            yield add
        finally:
            self.bytes -= counted


async def read_body(request: Request, limits: Limits, count: Count) -> bytes:
    """A body that says to be JSON. count: is told the size of each piece that is kept. Raises ApiError if it may not be
    read, and ClientDisconnect."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        # This also keeps pages of other sites from asking, which a browser lets them do with other types of content.
        raise ApiError(415, f"content-type: got {kind[:100]!r}, allowed: application/json")
    charset = parameters.strip().lower()
    if charset not in ("", "charset=utf-8", 'charset="utf-8"'):
        raise ApiError(415, f"content-type: got {charset[:100]!r}, allowed: charset=utf-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "content-encoding: allowed: identity, that is none")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limits.body and "expect" in request.headers:
        raise _too_large(limits)  # the client waits for leave to send it
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _read_pieces(request, limits, count)
    except TimeoutError:
        raise ApiError(408, f"body: not here after {limits.body_seconds:g} seconds", close=True) from None


async def _read_pieces(request: Request, limits: Limits, count: Count) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limits.body * _DISCARDED:
            break
        if size <= limits.body:
            count(len(piece))
            pieces.append(piece)
        else:
            pieces.clear()
    if size > limits.body:
        raise _too_large(limits)
    return b"".join(pieces)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"body: too large, allowed: at most {limits.body:,} bytes", close=True)


def parse(body: bytes) -> Any:
    """Strict JSON: no NaN, no key twice, no half characters. Raises ApiError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ApiError(400, f"body: not JSON at character {error.pos} ({error.msg})") from None
    except UnicodeEncodeError:
        raise ApiError(400, "body: has half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ApiError(400, "body: nested too deeply") from None
    except ValueError as error:  # a key twice, a constant, an integer of thousands of digits
        raise ApiError(400, f"body: {str(error)[:200]}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_KEYS:
        raise ValueError(f"an object has {len(pairs)} keys, allowed: at most {_MOST_KEYS}")
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a key twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
