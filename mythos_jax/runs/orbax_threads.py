"""Orbax's threads and messages, kept from the user: a failed read or save is one error, and does not delay the exit."""

import contextlib
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from mythos_jax.calls import Call


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences absl's logger below errors: Orbax uses it to report each call and to warn about its own defaults.

    Failures are raised, not logged, so nothing is lost. The level is restored, as the logger belongs to others, too.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def in_daemon_thread(work: Callable[[], object]) -> None:
    """Runs Orbax's `work` in a thread, so that the threads that it starts are daemons, as the children of one are.

    After a failed save, some of them wait for minutes for signals that will not come, and Python would wait for them
    before it exits. Nothing is lost: the program waits for the saves themselves.
    """
    call = Call(work, "checkpoint")
    call.ended.wait()
    if call.error is not None:
        raise call.error


def quiet_background_errors() -> None:
    """Reduces a failed read or background write to the one error that `Checkpoints` raises. For programs, not for
    libraries: it changes logging and exception hooks of the whole process.

    Orbax raises the error in the thread that reads, saves or waits, but it also logs it and lets it end threads and
    event loops of its own, each of which prints a traceback; so do the reads that have not ended when one fails. Errors
    from elsewhere are shown as before.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    for owner, name in [(threading, "excepthook"), (sys, "unraisablehook"), (sys, "excepthook")]:
        if not isinstance(hook := getattr(owner, name), _WithoutOrbax):
            setattr(owner, name, _WithoutOrbax(hook))


class _WithoutOrbax:
    """An exception hook that ignores errors from Orbax and from event loops that it closed."""

    def __init__(self, previous: Callable[..., None]):
        self._previous = previous

    def __call__(self, *details: Any) -> None:
        """details: one object with what `sys.excepthook` gets as type, value and traceback."""
        value, trace = details[1:] if len(details) == 3 else (details[0].exc_value, details[0].exc_traceback)
        from_orbax = len(details) == 1 and any("orbax" in frame.filename for frame in traceback.extract_tb(trace))
        if not (from_orbax or "Event loop is closed" in str(value)):
            self._previous(*details)
