"""What the package prints: log lines and results, on streams that may be closed or have nobody left who reads them."""

import contextlib
import logging
import os
import sys
from typing import Any


class _StandardError(logging.Handler):
    """Writes to whatever `sys.stderr` is when a line is logged, which a test or a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


_logger = logging.getLogger("mythos_jax")
if not _logger.handlers:  # a program that configures the logger itself, before or after, has its way
    _logger.addHandler(_StandardError())
    _logger.propagate = False
if _logger.level == logging.NOTSET:
    _logger.setLevel(logging.INFO)


def log(text: str, level: int = logging.INFO) -> None:
    """Logs one line: to standard error, unless the logger "mythos_jax" is configured otherwise."""
    _logger.log(level, text)


def counted(number: int, noun: str, many: str = "") -> str:
    """Such as "1 row" and "2,000 rows". many: the plural, if it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def replace_closed() -> None:
    """Opens /dev/null in place of each standard stream that is closed, as after `2>&-`.

    To be called first in a program: the next file that is opened would get the stream's number, and with it what C++
    code prints.
    """
    for number, name in enumerate(["stdin", "stdout", "stderr"]):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115  open until the end


def say(text: str) -> None:
    """Prints a line on standard error. If nobody can read it any more, the program goes on in silence."""
    _print(text, sys.stderr)


def print_result(text: str) -> None:
    """Prints on standard output, for a command whose work is done and saved whether somebody reads this or not."""
    _print(text, sys.stdout)


def discard(stream: Any) -> None:
    """Lets a stream that cannot be written to write to /dev/null, so that the flush at exit does not fail either."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, stream.fileno())
        os.close(number)


def _print(text: str, stream: Any) -> None:
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # a closed pipe, a terminal that is gone, a closed file
        discard(stream)
