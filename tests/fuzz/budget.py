"""How many random inputs a fuzz test tries, and how long one of them may take.

`make test` tries a few of each, the same ones every time; `make fuzz` tries as many as the docstring of a test says.
"""

import contextlib
import os
import signal

from hypothesis import HealthCheck, settings

FULL = os.environ.get("MYTHOS_FUZZ") == "full"
SECONDS = 30  # an input that takes longer counts as a hang


def examples(short: int, full: int) -> int:
    """The number of inputs to try: `short` in the suite, `full` under `make fuzz`."""
    return full if FULL else short


def budget(short: int, full: int) -> settings:
    """hypothesis settings for a test that may be slow per example, and that is repeatable in the suite."""
    return settings(
        max_examples=examples(short, full),
        deadline=None,
        derandomize=not FULL,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def no_hang(seconds: int = SECONDS):
    """Raises TimeoutError in the block if it takes longer. Main thread only."""

    def hangs(*_):
        raise TimeoutError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
