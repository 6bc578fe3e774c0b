"""The quickstart as a local pod that is stopped and killed, against a run that nothing disturbs.

    python launch/tests/pod.py [--steps 120] [--devices 1]

One process trains alone. A pod of two then trains the same: a third of the way one process gets SIGTERM, two thirds of
the way the other gets SIGKILL; the pod starts again by itself each time. Prints the steps at which it went on and how
far the losses are apart; ends with 1 where the first six differ by more than 1e-5 (later drift is chaos).
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

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
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
    subprocess.run([*python, "mythos_jax.cli", *command, "--workdir", str(folder / "alone")], env=alone, check=True)
    print(f"alone: {time.time() - started:.0f} s; the pod …", flush=True)

    started, log = time.time(), folder / "pod.log"
    with log.open("w") as output:
        pod = [*python, "mythos_jax.pod", "--devices", str(arguments.devices), "--restarts", "2"]
        process = subprocess.Popen([*pod, *command, "--workdir", str(folder / "pod")], stdout=output, stderr=output)
    blows = [(steps // 3, signal.SIGTERM, 1), (2 * steps // 3, signal.SIGKILL, 0)]
    for attempt, (at, number, member) in enumerate(blows):
        while process.poll() is None and at not in losses(folder / "pod"):
            time.sleep(0.01)
        pids = re.findall(r"pod: started (\d+), (\d+)", log.read_text())[attempt]
        os.kill(int(pids[member]), number)
        sent = time.time()
        while process.poll() is None and log.read_text().count("pod: processes ended with") <= attempt:
            time.sleep(0.01)
        took = time.time() - sent
        print(f"{number.name} to process {member} after step {at}: all ended {took:.1f} s later", flush=True)
    code = process.wait()
    said = re.findall(r"pod: processes ended.*|.*stopped by.*|.*is gone.*|resuming.*|trained to.*", log.read_text())
    print("\n".join(said))
    resumed = [int(step) for step in re.findall(r"resuming .* after step (\d+)", log.read_text())]
    one, two = losses(folder / "alone"), losses(folder / "pod")
    apart = {step: abs(one[step] - two[step]) for step in one if step in two}
    print(f"the pod took {time.time() - started:.0f} s, ended with {code} and logged {len(two)} of {steps} steps")
    good = code == 0 and sorted(two) == list(range(1, steps + 1))
    first = max(apart[step] for step in range(1, 7))
    good &= first < 1e-5
    print(f"losses apart by at most {first:.1e} over steps 1 to 6, {max(apart.values()):.1e} over all")
    for start in resumed:
        after = [abs(one[step] - two[step]) for step in range(start + 1, start + 7)]
        print(f"went on after step {start}: apart by {apart[start]:.1e} there, at most {max(after):.1e} over six more")
    return 0 if good else 1


def losses(workdir: Path) -> dict[int, float]:
    log = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    return {row["step"]: row["loss"] for row in rows}


if __name__ == "__main__":
    sys.exit(main())
