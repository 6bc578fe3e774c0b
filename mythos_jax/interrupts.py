"""Ctrl-C where Python alone would show a traceback, crash, or go on: while modules are imported, and in callbacks whose
exceptions nobody catches; and Ctrl-C that stops a part of a program."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from mythos_jax.errors import INTERRUPTED, RESTART

# Seconds. A signal that comes just before a thread starts to wait is handled when the wait ends: waits are cut into
# turns of this length.
TURN = 0.2


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A signal handler for a program that has not begun its work."""
    restart = number == signal.SIGTERM
    os.write(2, b"mythos: stopped by SIGTERM; run the same command again\n" if restart else b"mythos: interrupted\n")
    os._exit(RESTART if restart else INTERRUPTED)


def is_default() -> bool:
    """Whether Ctrl-C has Python's own handler. It may be ignored, as after nohup, or belong to a caller."""
    main_thread = threading.current_thread() is threading.main_thread()
    return main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextlib.contextmanager
def caught() -> Iterator[list[int]]:
    """Raises KeyboardInterrupt in the block on Ctrl-C, as always, but ends the process at once if a module is being
    imported: a module in C may turn the exception into another one, or crash.

    Yields a list that is not empty once Ctrl-C was pressed.
    """
    pressed: list[int] = []
    if not is_default():
        yield pressed
        return
    previous = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            end_at_once(number, frame)
        pressed.append(number)
        raise KeyboardInterrupt

    def again(details: Any) -> None:
        """Python prints an exception in a callback, for example of the garbage collector, and goes on."""
        if details.exc_type is not None and issubclass(details.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            previous(details)

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = again
    try:
        yield pressed
    finally:
        sys.unraisablehook = previous
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Notes the first Ctrl-C in the block, in the list that it yields, for a loop to stop at when it is ready. The next
    one does what Ctrl-C did before."""
    pressed: list[int] = []
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield pressed
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            previous(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles these signals in the block. Outside the main thread signals are left to the caller."""
    try:
        previous = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Ends waits in C in the block, such as that of `input` for a key, once per turn, so that a Ctrl-C that came just
    before one of them is handled."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, TURN, TURN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
