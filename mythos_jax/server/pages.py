"""The page at `/`: files of the package, which ask nothing of the network but this server."""

from collections.abc import Callable
from importlib import resources

from fastapi import FastAPI
from starlette.responses import Response

FILES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
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
    folder = resources.files("mythos_jax.server") / "page"
    for name, kind in FILES.items():
        path = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(
            path, _serve((folder / name).read_bytes(), kind), methods=["GET", "HEAD"], include_in_schema=False
        )


def _serve(content: bytes, kind: str) -> Callable[[], Response]:
    def serve() -> Response:
        return Response(content, media_type=None, headers={**_HEADERS, "content-type": kind})

    return serve
