"""The page over HTTP, to this machine alone."""

import contextlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mythos_jax.errors import ConfigError

_HOST = "127.0.0.1"
_NAMES = (_HOST, "localhost")  # what a browser may call it; a page from elsewhere that resolves to it is refused


def page_server(port: int, render: Callable[[], str]) -> ThreadingHTTPServer:
    """A server whose `serve_forever` answers / with what `render` returns, asked by one thread at a time. port: 0 for a
    free one. Raises ConfigError if the port cannot be had."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in _NAMES:
                self.send_error(403, "the page is for this machine alone")
                return
            if self.path.partition("?")[0] != "/":
                self.send_error(404)
                return
            with lock:
                body = render().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the tab was closed
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer((_HOST, port), Handler)
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot listen there ({error.strerror or error})") from None
    server.daemon_threads = True
    return server
