"""The quickstart as two local processes that are stopped and killed, compared with an undisturbed run.

    python launch/tests/interruptions.py [--steps 120] [--devices 1]

One process trains alone. Two processes then train the same: a third of the way one of them gets SIGTERM, two thirds of
the way the other gets SIGKILL; the launcher restarts them each time. Prints the steps at which they resumed and how far
the losses differ; exits with 1 if the first six differ by more than 1e-5 (later drift is chaotic).
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG, LAUNCHER = ROOT / "configs" / "quickstart.yaml", ROOT / "launch" / "local_processes.py"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--devices", type=int, default=1, help="per process")
    parser.add_argument("--workdir", type=Path, default=None)
    arguments = parser.parse_args()
    steps, folder = arguments.steps, arguments.workdir or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    fields = {
        "training.steps": steps,
        "training.log_every": 1,
        "training.checkpoint_every": steps // 6,
        "data.path": folder / "data",
    }
    command = ["train", str(CONFIG), *(word for name, value in fields.items() for word in (f"--{name}", str(value)))]

    print("alone …", flush=True)
    python = [sys.executable, "-m"]
    alone = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = time.time()
    subprocess.run([*python, "mythos_jax", *command, "--workdir", str(folder / "alone")], env=alone, check=True)
    print(f"alone: {time.time() - started:.0f} s; two processes …", flush=True)

    started, log = time.time(), folder / "two.log"
    with log.open("w") as output:
        launcher = [sys.executable, str(LAUNCHER), "--devices", str(arguments.devices), "--restarts", "2"]
        process = subprocess.Popen(
            [*launcher, *command, "--workdir", str(folder / "two")], stdout=output, stderr=output
        )
    interruptions = [(steps // 3, signal.SIGTERM, 1), (2 * steps // 3, signal.SIGKILL, 0)]
    for attempt, (at, number, member) in enumerate(interruptions):
        while process.poll() is None and at not in losses(folder / "two"):
            time.sleep(0.01)
        pids = re.findall(r"local_processes: started (\d+), (\d+)", log.read_text())[attempt]
        os.kill(int(pids[member]), number)
        sent = time.time()
        while process.poll() is None and log.read_text().count("local_processes: processes ended with") <= attempt:
            time.sleep(0.01)
        took = time.time() - sent
        print(f"{number.name} to process {member} after step {at}: all ended {took:.1f} s later", flush=True)
    code = process.wait()
    messages = re.findall(
        r"local_processes: processes ended.*|.*stopped by.*|.*is gone.*|resuming.*|trained to.*", log.read_text()
    )
    print("\n".join(messages))
    resumed = [int(step) for step in re.findall(r"resuming .* after step (\d+)", log.read_text())]
    one, two = losses(folder / "alone"), losses(folder / "two")
    apart = {step: abs(one[step] - two[step]) for step in one if step in two}
    print(f"two processes took {time.time() - started:.0f} s, ended with {code} and logged {len(two)} of {steps} steps")
    good = code == 0 and sorted(two) == list(range(1, steps + 1))
    first = max(apart[step] for step in range(1, 7))
    good &= first < 1e-5
    print(f"losses differ by at most {first:.1e} over steps 1 to 6, {max(apart.values()):.1e} over all")
    for start in resumed:
        after = [abs(one[step] - two[step]) for step in range(start + 1, start + 7)]
        print(f"resumed after step {start}: {apart[start]:.1e} apart there, at most {max(after):.1e} over the next six")
    return 0 if good else 1


def losses(workdir: Path) -> dict[int, float]:
    log = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    return {row["step"]: row["loss"] for row in rows}


if __name__ == "__main__":
    sys.exit(main())
