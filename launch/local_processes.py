"""Runs a `mythos` command as several CPU processes on this machine, connected over gloo.

    python launch/local_processes.py --processes 2 --devices 4 train quickstart --workdir runs/a

It treats exit codes as every launcher here does: it restarts after 42 and after a process killed by a signal, a limited
number of times, and never after 1, 2 or 130.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from mythos_jax.cluster import COORDINATOR, PROCESS_ID, PROCESSES
from mythos_jax.errors import DONE, FAILED, INTERRUPTED, RESTART, WRONG_INPUT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mythos COMMAND …` as one run of several processes; returns its exit code (see `combined_exit_code`)."""
    arguments = _parser().parse_args(argv)
    if arguments.processes < 1 or arguments.devices < 1:
        _log("got --processes or --devices below 1, allowed: integers >= 1")
        return WRONG_INPUT
    command = [sys.executable, "-m", "mythos_jax", *arguments.command]
    if arguments.dry_run:
        print("\n".join(_described(arguments, command)))
        return DONE
    code = DONE
    for attempt in range(arguments.restarts + 1):
        if attempt:
            _log(f"restart {attempt} of at most {arguments.restarts}")
        processes = _Processes(command, arguments.processes, arguments.devices)
        code = processes.run(arguments.grace)
        if processes.received or code != RESTART:
            break
    return code


def combined_exit_code(codes: Sequence[int]) -> int:
    """One exit code for all processes: a failure that would recur if there is one; else 42 unless all are 0."""
    for code in (INTERRUPTED, WRONG_INPUT, FAILED):
        if code in codes:
            return code
    return RESTART if any(codes) else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="local_processes.py", description="Runs a mythos command as several CPU processes on this machine."
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--devices", type=int, default=4, metavar="M", help="CPU devices per process (default 4)")
    parser.add_argument("--restarts", type=int, default=3, metavar="R", help="maximum restarts (default 3)")
    parser.add_argument(
        "--grace",
        type=float,
        default=120,
        metavar="S",
        help="seconds the other processes may still run after one has failed (default 120)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND …", help="what follows `mythos`")
    return parser


def _environment(port: int, processes: int, process_id: int, devices: int) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_NUM_CPU_DEVICES": str(devices),
        COORDINATOR: f"127.0.0.1:{port}",
        PROCESSES: str(processes),
        PROCESS_ID: str(process_id),
    }


def _described(arguments: argparse.Namespace, command: list[str]) -> list[str]:
    lines = []
    for i in range(arguments.processes):
        variables = _environment(0, arguments.processes, i, arguments.devices) | {COORDINATOR: "127.0.0.1:PORT"}
        lines.append(" ".join(f"{name}={value}" for name, value in variables.items()) + f" {shlex.join(command)} &")
    restarts = f"at most {arguments.restarts} times"
    return [*lines, f"# again after exit code {RESTART} or a process killed by a signal, {restarts}"]


class _Processes:
    """One attempt. `received`: the signal that asked this program itself to stop; 0: none."""

    def __init__(self, command: list[str], count: int, devices: int):
        port = _free_port()
        # In sessions of their own, so that a Ctrl-C reaches each of them once, through this program.
        self.members = [
            subprocess.Popen(command, env=os.environ | _environment(port, count, i, devices), start_new_session=True)
            for i in range(count)
        ]
        self.received = 0
        _log(f"started {', '.join(str(member.pid) for member in self.members)}")

    def run(self, grace: float) -> int:
        """Waits for all of them; kills those still running `grace` seconds after one failed. Returns one exit code."""
        previous = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._wait(grace)
        finally:
            for member in self.members:
                if member.poll() is None:
                    member.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _wait(self, grace: float) -> int:
        first_failure = None
        while any(member.poll() is None for member in self.members):
            if first_failure is None and any(member.poll() for member in self.members):
                first_failure = time.monotonic()
            if first_failure is not None and time.monotonic() - first_failure > grace:
                _log(f"killing what still runs {grace:.0f} s after the first failure")
                for member in self.members:
                    member.kill()
            time.sleep(0.05)
        codes = [member.returncode for member in self.members]
        if any(codes):
            _log(f"processes ended with {', '.join(map(str, codes))}")
        return INTERRUPTED if self.received == signal.SIGINT else combined_exit_code(codes)

    def _forward(self, number: int, _: object) -> None:
        self.received = number
        for member in self.members:
            if member.poll() is None:
                member.send_signal(number)


def _log(text: str) -> None:
    print(f"local_processes: {text}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
