"""Runs the launchers in launch/ with fake versions of the clouds' commands."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
CONFIG = "configs/mythos_1b.yaml"
SETTINGS = {
    "TOPOLOGY": "v5p:2x2x4",
    "SLICES": "2",
    "BUCKET": "gs://bucket/",
    "IMAGE": "registry/image:1",
    "ZONE": "zone-a",
    "CLUSTER": "cluster",
    "LOCATION": "place",
    "RESTARTS": "2",
    "GRACE": "200",
}
CLOUD = ["gke", "gcluster", "tpu_vm", "skypilot"]


@pytest.fixture
def launch(tmp_path):
    """Runs a launcher and records the commands that it calls; `fakes` maps a command to the body of a bash script."""

    def run(name, *words, fakes=None, **settings):
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir(exist_ok=True)
        for command in {"mythos", "kubectl", "gcluster", "gcloud", "sky", "sbatch", "squeue", "sleep", *(fakes or {})}:
            body = (fakes or {}).get(command, "exit 0")
            stdin = f"cat > {tmp_path}/stdin\n" if command == "kubectl" else ""
            (folder / command).write_text(
                f'#!/bin/bash\n{stdin}echo "{command} $*" >> {calls}\ncd {tmp_path}\n{body}\n'
            )
            (folder / command).chmod(0o755)
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path), **SETTINGS, **settings}
        done = subprocess.run(
            ["bash", LAUNCH / f"{name}.sh", *words], env=environment, capture_output=True, text=True, timeout=60
        )
        done.calls = calls.read_text().splitlines() if calls.exists() else []
        return done

    return run
