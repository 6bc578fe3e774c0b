"""The HTTP application: which paths there are, and what answers them."""

from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from mythos_jax.server import chat, completions
from mythos_jax.server.choices import Choices
from mythos_jax.server.errors import ApiError, Json, invalid
from mythos_jax.server.gate import Gate
from mythos_jax.server.limits import Count, parse, read_body
from mythos_jax.server.metrics import CONTENT_TYPE
from mythos_jax.server.openapi import ERRORS, describe, takes
from mythos_jax.server.options import Asked
from mythos_jax.server.pages import add_page
from mythos_jax.server.schemas import ChatRequest, Common, CompletionRequest
from mythos_jax.server.service import Service
from mythos_jax.server.shapes import Shape, Writer
from mythos_jax.server.streams import stream, whole
from mythos_jax.version import __version__

_LARGE = 2**15  # bytes of a body

Body = TypeVar("Body", bound=BaseModel)


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="mythos", version=__version__, docs_url=None, redoc_url=None)
    _add_generation(app, service)
    _add_status(app, service)
    add_page(app)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Gate, service=service)
    if service.origins:  # outermost: it answers a browser's question whether it may ask, which has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for JavaScript sends many of its own
            expose_headers=["retry-after", "x-request-id"],
        )
    describe(app, CompletionRequest, ChatRequest)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", openapi_extra=takes(CompletionRequest), responses=ERRORS)
    async def complete(request: Request) -> Response:
        """Continues a prompt, or each of several."""
        with service.buffered.of_a_body() as count:
            asked = await completions.read(service, await _read(request, service, CompletionRequest, count))
        return await _generate(request, service, completions.CompletionShape(), *asked)

    @app.post("/v1/chat/completions", openapi_extra=takes(ChatRequest), responses=ERRORS)
    async def answer(request: Request) -> Response:
        """Answers a conversation."""
        with service.buffered.of_a_body() as count:
            asked = await chat.read(service, await _read(request, service, ChatRequest, count))
        return await _generate(request, service, chat.ChatShape(), *asked)


def _add_status(app: FastAPI, service: Service) -> None:
    model = service.model

    @app.get("/v1/models")
    async def models() -> Response:
        """The names of the model, and what it can do."""
        return Json({"object": "list", "data": [model.card(name, service.defaults) for name in model.names]})

    @app.get("/v1/models/{name:path}", responses={404: ERRORS[404]})
    async def one_model(name: str) -> Response:
        """What one of these names stands for."""
        model.require_name(name)
        return Json(model.card(name, service.defaults))

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> Response:
        """Whether the process works."""
        if service.failed:
            raise ApiError(503, f"the engine has failed: {service.failed}", code="engine_failed")
        return Json({"status": "ok"})

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> Response:
        """Whether it takes requests: not before everything is compiled, and not while it stops."""
        service.require_ready()
        return Json({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)


async def _read(request: Request, service: Service, kind: type[Body], count: Count) -> Body:
    """The body of a request to generate. Raises ApiError, at once if it would be refused anyway."""
    service.require_ready()
    content = await read_body(request, service.limits, count)
    service.require_ready()  # it may have been asked to stop since
    # A large one takes some time.
    body = _validated(kind, content) if len(content) < _LARGE else await service.aside(_validated, kind, content)
    if isinstance(body, Common):
        service.model.require_name(body.model)
    return body


def _validated(kind: type[Body], content: bytes) -> Body:
    """Raises ApiError."""
    try:
        return kind.model_validate(parse(content))
    except ValidationError as error:
        raise invalid(error) from None


async def _generate(
    request: Request, service: Service, shape: Shape, wanted: Asked, prompts: list[list[int]]
) -> Response:
    state = request.scope["state"]
    choices = Choices(service, wanted, prompts, state["accepted"])
    writer = Writer(shape, choices, state["id"])

    def done() -> None:
        choices.close()
        state["summary"] = choices.summary

    choices.submit()
    if wanted.body.stream:
        return stream(choices, writer, done)
    try:
        return await whole(request, choices, writer)
    finally:
        done()


async def _on_api_error(request: Request, error: Any) -> Response:
    return error.response()


async def _on_http_error(request: Request, error: Any) -> Response:
    """Starlette's own: no such path, or not this method."""
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response
