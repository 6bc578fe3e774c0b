"""Shared by the speed benchmarks: cores and devices, calls timed in turn, and table cells.

Importing this module starts neither jax nor torch, because both count the cores they may use when they start.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

Call = Callable[[], Any]
Times = dict[str, list[float]]  # side -> seconds in each turn


def use_cores(threads: int) -> None:
    """Restricts this process, and the threads it starts from now on, to `threads` cores."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        exit_with(f"--threads: got {threads}, allowed: 1 to {len(allowed)}, the available cores")
    os.sched_setaffinity(0, allowed[:threads])


def use_device(device: str) -> None:
    """Makes jax use `cpu` or `gpu`. Call it before jax starts; ends the program if there is no such device."""
    import jax

    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # AssertionError: jax has no plugin for the device
        exit_with(f"--device: got {device}, but jax finds none here (a GPU needs its driver and jax[cuda13])")


def exit_with(message: str) -> NoReturn:
    """Prints one line for the user, and exits with code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def seconds_of(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_in_turns(sides: dict[str, Call], repeats: int) -> tuple[Times, dict[str, float]]:
    """Seconds of each call in each of `repeats` rounds, in which all sides take their turn; and, separately, seconds of
    the first calls, which compile.

    The calls must wait for their results. Each turn starts with a call that is not timed, so that the contents of
    caches and memory are the side's own.
    """
    first = {side: seconds_of(call) for side, call in sides.items()}
    times: Times = {side: [] for side in sides}
    for _ in range(repeats):
        for side, call in sides.items():
            call()
            times[side].append(seconds_of(call))
    return times, first


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratios within each round, so that what slows the machine for a while cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def median_and_range(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """A table cell: the median, followed by the minimum and maximum in brackets."""
    median, low, high = (f"{scale * f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({low} to {high})"


def milliseconds(seconds: Sequence[float]) -> str:
    return median_and_range(seconds, 1e3)


def print_row(*cells: Any) -> None:
    """Prints a row of a Markdown table, without waiting for the rest of the table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_header(*names: str) -> None:
    print_row(*names)
    print("|" + "---|" * len(names), flush=True)
