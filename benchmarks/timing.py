"""What the speed benchmarks share: cores and devices, calls timed by turns, and cells of their tables.

Nothing here starts jax or torch: both count the cores they may use when they start.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

Call = Callable[[], Any]
Times = dict[str, list[float]]  # side -> seconds of each turn


def use_cores(threads: int) -> None:
    """Keeps this process, and the threads that it is yet to start, to so many cores."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        refuse(f"--threads: got {threads}, allowed: 1 to {len(allowed)}, the cores there are")
    os.sched_setaffinity(0, allowed[:threads])


def use_device(device: str) -> None:
    """Puts jax on `cpu` or `gpu`, before it starts; ends the program where it has no such device."""
    import jax

    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # the second where jax has no plugin for it at all
        refuse(f"--device: got {device}, but jax finds none here (a GPU needs its driver and jax[cuda13])")


def refuse(message: str) -> NoReturn:
    """One line to the user, exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def seconds_of(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def by_turns(sides: dict[str, Call], repeats: int) -> tuple[Times, dict[str, float]]:
    """Seconds of each call over `repeats` turns, every side once a turn; and, apart, those of its first call, which
    compiles. The calls must wait for their results. Each turn begins with a call that is not timed: caches and memory
    are then its own, not those that the other side left."""
    first = {side: seconds_of(call) for side, call in sides.items()}
    times: Times = {side: [] for side in sides}
    for _ in range(repeats):
        for side, call in sides.items():
            call()
            times[side].append(seconds_of(call))
    return times, first


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Turn by turn, so that what slows the machine for a while slows both."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """A cell: the median, and in brackets the least and the most."""
    middle, least, most = (f"{scale * f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({least} to {most})"


def milliseconds(values: Sequence[float]) -> str:
    return spread(values, 1e3)


def row(*cells: Any) -> None:
    """Prints a line of a Markdown table, at once."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*names: str) -> None:
    row(*names)
    print("|" + "---|" * len(names), flush=True)
