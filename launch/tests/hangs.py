"""Runs that hang: a process is frozen (SIGSTOP), or the storage is, and what is left must end with 42 and resume.

    python launch/tests/hangs.py [--timeout 20]
    pip install gcsfs gcp-storage-emulator && python launch/tests/hangs.py --storage

Trains two processes on this machine and freezes process 0, then process 1. With --storage, trains one process whose run
directory is in an emulator of Cloud Storage, and freezes the emulator. Prints when the others end, with which code,
what they say, and where the run resumes.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.survival import last_step  # noqa: E402

LAUNCHER = ROOT / "launch" / "local_processes.py"
PORT = 9124
CONFIG = """
model: {vocab_size: 16, dim: 16, max_seq_len: 32, prelude_layers: 0, coda_layers: 0, loops: 2, n_heads: 2,
        n_kv_heads: 2, hidden_dim: 16}
training: {steps: 1000000, batch_size: 8, log_every: 1, warmup_steps: 2}
data: {task: {name: parity, difficulty: [16]}, seq_len: 32}
"""
SAYS = r"mythos: .*(?:has not ended|does not answer|it hangs|is at |is gone).*|.*resuming.*|local_processes: proc.*"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=float, default=20, help="training.hang_timeout (default 20)")
    parser.add_argument("--heartbeat", type=int, default=300, help="--heartbeat-timeout (default 300: later than that)")
    parser.add_argument("--storage", action="store_true", help="freeze the storage instead of a process")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(CONFIG)
    if arguments.storage:
        return storage(folder, arguments.timeout)
    return max(process(folder, which, arguments) for which in (0, 1))


def process(folder: Path, which: int, arguments: argparse.Namespace) -> int:
    """Freezes one of two processes."""
    workdir, log = folder / f"run_{which}", folder / f"{which}.log"
    launcher = [sys.executable, str(LAUNCHER), "--devices", "1", "--restarts", "0", "--grace", "600"]
    command = [*launcher, *train(folder, workdir, arguments.timeout), "--heartbeat-timeout", str(arguments.heartbeat)]
    with log.open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output)
    wait_for(lambda: last_step(workdir) >= 60 or run.poll() is not None)
    pids = [int(pid) for pid in re.findall(r"started (\d+), (\d+)", log.read_text())[0]]
    took = freeze(pids[which], lambda: not is_alive(pids[1 - which]))
    os.kill(pids[which], signal.SIGKILL)
    run.wait()
    print(f"SIGSTOP to process {which}: the other ended {took:.1f} s later, hang_timeout {arguments.timeout:.0f} s")
    return report(log, workdir, [*launcher, *train(folder, workdir, arguments.timeout)], run.returncode)


def storage(folder: Path, timeout: float) -> int:
    """Freezes the emulator of Cloud Storage in which the run directory is."""
    url = f"http://127.0.0.1:{PORT}"
    os.environ |= {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "JAX_PLATFORMS": "cpu",
    }
    emulator = subprocess.Popen([sys.executable, __file__, "emulator"])
    try:
        from mythos_jax.paths import to_path

        workdir, log = to_path("gs://bucket/run"), folder / "storage.log"
        command = [sys.executable, "-m", "mythos_jax", *train(folder, workdir, timeout, every=200)]
        with log.open("w") as output:
            run = subprocess.Popen(command, stdout=output, stderr=output)
        wait_for(lambda: re.search(r"train config: \d{2,}", log.read_text()) or run.poll() is not None, 400)
        took = freeze(emulator.pid, lambda: run.poll() is not None)
        print(f"SIGSTOP to the storage: the run ended {took:.1f} s later, hang_timeout {timeout:.0f} s", flush=True)
        os.kill(emulator.pid, signal.SIGCONT)
        return report(log, None, command, run.returncode)
    finally:
        emulator.kill()


def emulate() -> int:
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    from launch.tests.gcs import with_generations

    with_generations(objects)
    server = create_server("127.0.0.1", PORT, in_memory=True, default_bucket="bucket")
    server.start()
    signal.pause()
    return 0


def train(folder: Path, workdir: Any, timeout: float, every: int = 50) -> list[str]:
    fields = {"training.hang_timeout": timeout, "training.checkpoint_every": every}
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return ["train", str(folder / "config.yaml"), "--workdir", str(workdir), *words]


def freeze(pid: int, ended: Any) -> float:
    """Seconds until `ended`."""
    os.kill(pid, signal.SIGSTOP)
    begin = time.time()
    wait_for(ended)
    return time.time() - begin


def report(log: Path, workdir: Path | None, command: list[str], code: int) -> int:
    """Prints what the run said, and resumes it for a moment. Returns 0 if it ended with 42 and resumed."""
    print("\n".join(line[:200] for line in re.findall(SAYS, log.read_text())))
    before = last_step(workdir) if workdir else 0
    with log.open("w") as output:
        again = subprocess.Popen(command, stdout=output, stderr=output)
    wait_for(lambda: again.poll() is not None or re.search(r"resuming .*|train config: ", log.read_text()), 400)
    again.send_signal(signal.SIGTERM)
    again.wait(timeout=200)
    resumed = re.search(r"resuming .* after step (\d+)", log.read_text())
    print(f"exit code {code}; last logged step {before}; {resumed[0] if resumed else log.read_text()}\n", flush=True)
    return 0 if code == 42 and resumed else 1


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 200) -> None:
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            raise TimeoutError
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(emulate() if sys.argv[1:] == ["emulator"] else main())
