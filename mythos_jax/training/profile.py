"""Profiler traces of a few training steps, and the server that takes them on request."""

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mythos_jax.errors import ConfigError
from mythos_jax.paths import copy_tree, is_remote
from mythos_jax.processes import process_prefix
from mythos_jax.streams import log


def start_profiler_server(first_port: int) -> None:
    """Lets TensorBoard or xprof take traces of process i at `first_port` + i: several may be on one host.

    jax cannot bind the server to one address, so everyone who reaches the host's port can do it. Raises ConfigError if
    the port is in use.
    """
    port = first_port + jax.process_index()
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--profiler-port: got {port} ({reason}), allowed: a port that is free") from None
    jax.profiler.start_server(port)
    log(f"{process_prefix()}profiler server on port {port} of all addresses of this host")


class Profiler:
    """Writes one trace of the steps `first` to `last`, for TensorBoard or Perfetto; none if `span` is empty.

    A context manager: leaving it ends a trace that is still being recorded.
    """

    def __init__(self, span: tuple[int, ...], folder: Any):
        """span: (first, last), both included, or (). folder: a local or remote directory."""
        self._span, self._folder, self._recording = span, folder, False
        # The profiler writes to a local disk only; a remote trace is copied when it is complete.
        self._local = Path(tempfile.mkdtemp(prefix="mythos-profile-")) if span and is_remote(folder) else folder

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one training step."""
        # `<=` rather than `==`: a resumed run may start inside the span.
        if self._span and self._span[0] <= step <= self._span[1] and not self._recording:
            jax.profiler.start_trace(str(self._local))
            self._recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._recording and step >= self._span[1]:
            self._stop()

    def _stop(self) -> None:
        if not self._recording:
            return
        jax.profiler.stop_trace()
        self._recording = False
        if self._local != self._folder:
            copy_tree(self._local, self._folder)
