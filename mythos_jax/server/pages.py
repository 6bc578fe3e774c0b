"""The page at `/`: files of the package, which ask nothing of the network but this server."""

from collections.abc import Callable
from importlib import resources

from fastapi import FastAPI
from starlette.responses import Response

_FOLDER = resources.files("mythos_jax.server") / "page"
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
FILES = {
    file.name: f"{_KINDS[kind]}; charset=utf-8"
    for file in _FOLDER.iterdir()
    if (kind := file.name.rpartition(".")[2]) in _KINDS
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    for name, kind in FILES.items():
        path = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(
            path, _serve((_FOLDER / name).read_bytes(), kind), methods=["GET", "HEAD"], include_in_schema=False
        )


def _serve(content: bytes, kind: str) -> Callable[[], Response]:
    def serve() -> Response:
        return Response(content, media_type=None, headers={**_HEADERS, "content-type": kind})

    return serve
