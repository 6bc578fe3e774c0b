"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}}."""

import json
import math
import re
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from mythos_jax.errors import one_line

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_LINE_ENDS = "\x85\u2028\u2029"  # where many a client would break an event of a stream
_MOST = 300  # characters of a value, or of a name that a client gave


class FieldError(ValueError):
    """A field that does not go with another one."""

    def __init__(self, param: str, allowed: str):
        super().__init__(f"{param}: allowed {allowed}")
        self.param = param


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """What a request gets instead of an answer.

    param: the field that is wrong. retry_after: seconds. close: the connection ends, because the request was not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, one_line(message), param, code
        self.retry_after, self.close = retry_after, close

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> "Json":
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.close:
            headers["connection"] = "close"
        return Json(self.body, self.status, headers)


class Json(Response):
    """JSON in UTF-8; half characters, which a client may have sent, become question marks."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in _LINE_ENDS:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace")


def busy(message: str, retry_after: float) -> ApiError:
    return ApiError(429, message, code="queue_full", retry_after=retry_after)


def invalid(error: ValidationError) -> ApiError:
    """What pydantic found wrong with the first field, and its name."""
    errors = error.errors(include_url=False)
    if isinstance(rule := errors[0].get("ctx", {}).get("error"), FieldError):
        return ApiError(400, str(rule), param=rule.param)
    # Of a union there are errors for each of its types: those that came furthest say most.
    same = [(_names(found["loc"]), found) for found in errors if found["loc"][:1] == errors[0]["loc"][:1]]
    depth = max(len(names) for names, _ in same)
    names, first = next(pair for pair in same if len(pair[0]) == depth)
    param = one_line(".".join(names), _MOST) or None
    if first["type"] == "extra_forbidden":
        message = f"{param}: unknown field"
    elif first["type"] == "missing":
        message = f"{param}: missing, but required"
    else:
        allowed = dict.fromkeys(_allowed(found) for others, found in same if others == names)
        message = f"{param or 'body'}: got {_shown(first['input'])}, allowed: {' or '.join(allowed)}"
    return ApiError(400, message, param=param, code=first["type"])


def _names(path: tuple[int | str, ...]) -> list[str]:
    """The fields and indices of a path, in which pydantic also names the types of a union."""
    return [str(part) for part in path if isinstance(part, int) or not _is_branch(part)]


def _is_branch(part: str) -> bool:
    """Whether a part of pydantic's path is no field but a type of a union."""
    return any(sign in part for sign in "[(") or part in ("str", "int")


def _allowed(found: Any) -> str:
    message = re.sub(r"^(Value error, |\w+ should (be|have) )", "", found["msg"])
    return one_line(message, _MOST)


def _shown(value: Any) -> str:
    """A value as JSON, shortened."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    try:
        return one_line(json.dumps(value, ensure_ascii=False)[:60], 60)
    except (TypeError, ValueError):  # an integer that Python does not spell
        return f"a value of type {type(value).__name__}"
