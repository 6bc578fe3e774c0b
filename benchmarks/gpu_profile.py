"""Where the time of a GPU goes (a step of gpu.py): seconds of each kernel, from the profiler's trace."""

import argparse
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu_models import mythos_config
from benchmarks.steps import train_step
from benchmarks.timing import print_header, print_row, seconds_of
from benchmarks.utilisation import decode_call

SHOWN = 20


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """The kernels of one train step of mythos_1b, and of decoding with it."""
    config = mythos_config(arguments.small)
    new = 4 if arguments.small else 16
    decode = decode_call(config.model, new)
    return {
        "step": _show("train step", train_step(config)),
        "decode": _show(f"decoding {new} tokens", lambda: decode(new)),
    }


def _show(title: str, call: Callable[[], Any]) -> dict[str, Any]:
    """Prints the kernels that take the most time, and how long the device did nothing."""
    call()
    plain, events = seconds_of(call), trace(call)
    total = sum(seconds for _, seconds in events)
    print_header(f"{title}: {1e3 * plain:.1f} ms, kernels {1e3 * total:.1f} ms", "runs", "ms", "%")
    kernels: dict[str, list[float]] = defaultdict(list)
    for about, seconds in events:
        kernels[re.sub(r"[._]?\d+(?=$|[._])", "", about["kernel"])[:60]].append(seconds)
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        print_row(name, len(times), f"{1e3 * sum(times):.2f}", f"{100 * sum(times) / total:.1f}")
    print()
    each: dict[str, dict[str, Any]] = {}
    for about, seconds in events:
        entry = each.setdefault(" ".join(about.values()), {**about, "runs": 0, "seconds": 0.0})
        entry["runs"] += 1
        entry["seconds"] += seconds
    return {"seconds": plain, "kernels": list(each.values())}


def trace(call: Callable[[], Any]) -> list[tuple[dict[str, str], float]]:
    """Every kernel that runs on the first GPU during the call, with its seconds; none on a CPU.

    Known of a kernel: its name, and, as far as the profiler has them, its instruction and where that comes from.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(file)).planes if p.name == "/device:GPU:0"]
        events = [e for plane in planes for line in plane.lines if line.name.startswith("Stream") for e in line.events]
        return [(_about(event), event.duration_ns / 1e9) for event in events]


def _about(event: Any) -> dict[str, str]:
    stats = {name: str(value) for name, value in event.stats if name in ("hlo_op", "name", "tf_op", "source")}
    return {"kernel": event.name, **stats}
