"""What shows a run from outside: the profiler server, and stacks on SIGUSR1."""

import faulthandler
import os
import signal
import socket

import pytest

from mythos_jax.commands.train import _show_stacks_on_request
from mythos_jax.errors import ConfigError
from mythos_jax.training.profile import start_profiler_server


def test_the_profiler_server_listens(capsys):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--profiler-port: got {port} \(.*\), allowed: a port that is free"):
            start_profiler_server(port)
    start_profiler_server(port)
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass
    assert f"profiler server on port {port} of all addresses" in capsys.readouterr().err


def test_sigusr1_shows_the_stacks_and_the_run_goes_on(capfd):
    previous = signal.getsignal(signal.SIGUSR1)
    _show_stacks_on_request()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        faulthandler.unregister(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == previous
    assert "in test_sigusr1_shows_the_stacks_and_the_run_goes_on" in capfd.readouterr().err
