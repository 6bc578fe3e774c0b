"""One step of benchmarks/gpu.sh, which names them: prints a Markdown table and writes what was measured as JSON.

    python -m benchmarks.gpu STEP [--device gpu|cpu] [--small] [--repeats 5] [--json FILE]

`--device cpu --small` tries a step with toy sizes. Ends with code 1 if a number is wrong.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TextIO

STEPS = {
    "check": "gpu_models.check",
    "grouped": "gpu_kernels.grouped",
    "attention": "gpu_kernels.attention_kernels",
    "golden": "gpu_models.golden",
    "gradients": "gpu_models.gradients",
    "mythos": "gpu_models.mythos",
    "profile": "gpu_profile.profile",
}


class _Copy(StringIO):
    """Passes on what is printed, and keeps it."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def write(self, text: str) -> int:
        self._out.write(text)
        self._out.flush()
        return super().write(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    import jax

    # The CPU is there, too, for comparison; the first one is the default.
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,cpu"}[arguments.device])
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {arguments.repeats} repeats\n")
    module, function = STEPS[arguments.step].split(".")
    printed = _Copy(sys.stdout)
    with redirect_stdout(printed):
        results = getattr(importlib.import_module(f"benchmarks.{module}"), function)(arguments)
    if arguments.json:
        about = {"device": device.device_kind, "jax": jax.__version__, "small": arguments.small}
        arguments.json.write_text(json.dumps(about | {arguments.step: results}, indent=1) + "\n", encoding="utf-8")
    return 1 if re.search(r"\bWRONG\b", printed.getvalue()) else 0


if __name__ == "__main__":
    sys.exit(main())
