"""Ports for what cannot be told to choose one itself."""

import random
import socket


def free_port() -> int:
    """A port of this machine that nobody listens on. The system gives none of these to those who let it choose, such as
    the other tests, so that nobody takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
