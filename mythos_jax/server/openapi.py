"""What /openapi.json says of requests, which the endpoints read themselves."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from mythos_jax.server.errors import ErrorReply

_REFERENCES = "#/components/schemas/{model}"
_MEANINGS = {
    400: "the request is wrong; `param` names the field",
    401: "no API key, or not the right one",
    404: "no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "too many requests; Retry-After says when to come again",
    500: "the engine has failed",
    503: "the server is starting or stopping",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": meaning} for status, meaning in _MEANINGS.items()
}


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra`: a body of this kind."""
    schema = {"$ref": _REFERENCES.format(model=kind.__name__)}
    stream = {"text/event-stream": {"schema": {"type": "string"}}, "application/json": {"schema": {"type": "object"}}}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "the reply, or with `stream` its events", "content": stream}},
    }


def describe(app: FastAPI, *kinds: type[BaseModel]) -> None:
    """Lets `app.openapi` add these bodies, which `takes` refers to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for kind in kinds:
                body = kind.model_json_schema(ref_template=_REFERENCES)
                schema["components"]["schemas"] |= {**body.pop("$defs", {}), kind.__name__: body}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
