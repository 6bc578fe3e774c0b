"""Compiles the train step of mythos_1b … mythos_1t, each for its slice, and updates the table in docs/pods.md.

    .venv-tpu/bin/python -m tests_tpu.all_sizes [--full] [NAME …]

With names, only their rows are updated. With `--full`, the compiler searches longer for fast code. That takes three
times as long, and the larger sizes need more than 24 GB of memory.
"""

import argparse
import datetime
import importlib.metadata
import os
import re
import time
from pathlib import Path

SLICES = {
    "mythos_1b": "v5e:4x4",
    "mythos_3b": "v5e:8x8",
    "mythos_10b": "v6e:8x8",
    "mythos_50b": "v5p:4x4x8",
    "mythos_100b": "v5p:4x8x8",
    "mythos_500b": "v5p:8x8x16",
    "mythos_1t": "v5p:16x16x16",
}
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pods.md"
HEAD = (
    "| config | slice | mesh | tokens per step | state | temporaries | peak of | fits | compiled / model FLOPs "
    "| roofline | bound by | sum | at best | of peak FLOPs | compiled in |\n" + "|---" * 15 + "|\n"
)


def row(name: str, quick: bool) -> str:
    """The row of one config in the table."""
    from mythos_jax.chips import GIB
    from mythos_jax.config import gathers_per_loop, load_config
    from mythos_jax.preflight.report import preflight
    from mythos_jax.preflight.topology import parse_topology

    config, topology = load_config(ROOT / "configs" / f"{name}.yaml"), parse_topology(SLICES[name])
    start = time.process_time()
    report = preflight(config, topology, quick=quick)
    seconds_taken = time.process_time() - start
    mesh = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    cells = [
        name,
        topology.name,
        mesh + (", gather per loop" if gathers_per_loop(config) else ""),
        f"{report.tokens / 1e6:.1f} M in {config.training.grad_accumulation_steps}",
    ]
    if report.fits:
        temporaries = report.hbm["temporaries"] + report.hbm["code"]
        model, seconds = report.flops["model"], report.step_seconds
        cells += [
            f"{(report.needed - temporaries) / GIB:.1f} GiB",
            f"{temporaries / GIB:.1f} GiB",
            f"{report.needed / GIB:.1f} of {topology.chip.hbm_bytes / GIB:.1f} GiB",
            "yes",
            f"{report.flops['compiled'] / model:.2f}",
            f"{max(report.seconds.values()):.3g} s",
            report.bound,
            f"{report.sum_seconds:.3g} s",
            f"{report.tokens / seconds:,.0f} tokens/s",
            f"{report.utilisation:.0%}",
        ]
    else:
        cells += ["", "", f"{report.needed / GIB:.1f} of {topology.chip.hbm_bytes / GIB:.1f} GiB", "**no**", *[""] * 6]
    return "| " + " | ".join([*cells, f"{seconds_taken:.0f} s" + ", quick" * quick]) + " |"


def write(rows: dict[str, str]) -> None:
    """Replaces rows of the table, and states when and with which versions they were made."""
    page = PAGE.read_text()
    table = re.search(r"<!-- all sizes -->\n(.*?)<!-- end -->", page, flags=re.DOTALL)
    lines = re.findall(r"^(\| (mythos_\w+) .*)$", table.group(1), flags=re.MULTILINE)
    all_rows = {name: line for line, name in lines} | rows
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    made = f"Made on {datetime.date.today():%-d %B %Y} with {versions}."
    body = HEAD + "".join(f"{all_rows[name]}\n" for name in SLICES if name in all_rows)
    PAGE.write_text(page[: table.start(1)] + made + "\n\n" + body + page[table.end(1) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*SLICES, []], help=f"which of {', '.join(SLICES)}")
    parser.add_argument("--full", action="store_true", help="let the compiler search longer for fast code")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in arguments.names or SLICES:
        line = row(name, quick=not arguments.full)
        print(line, flush=True)
        write({name: line})


if __name__ == "__main__":
    main()
