"""A pod on one machine: N processes with M CPU devices each, connected over gloo. `python -m mythos_jax.pod --help`.

What it does with exit codes is what every launcher of `launch/` does: start again after 42 and after a death by
signal, at most so many times; never after 1, 2 or 130.
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
from mythos_jax.errors import FAILED, INTERRUPTED, RESTART, WRONG_INPUT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mythos COMMAND …` as one run of several processes; returns its exit code (see `verdict`)."""
    arguments = _parser().parse_args(argv)
    if arguments.processes < 1 or arguments.devices < 1:
        print("pod: got --processes or --devices below 1, allowed: integers >= 1", file=sys.stderr)
        return WRONG_INPUT
    command = [sys.executable, "-m", "mythos_jax.cli", *arguments.command]
    if arguments.dry_run:
        for line in _described(arguments, command):
            print(line)
        return 0
    for attempt in range(arguments.restarts + 1):
        if attempt:
            print(f"pod: starting again, {attempt} of at most {arguments.restarts} times", file=sys.stderr)
        pod = _Pod(command, arguments.processes, arguments.devices)
        code = pod.run(arguments.grace)
        if pod.told or code != RESTART:
            break
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m mythos_jax.pod", description="A pod of CPU processes on one machine.")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--devices", type=int, default=4, metavar="M", help="CPU devices of each (default 4)")
    parser.add_argument("--restarts", type=int, default=3, metavar="R", help="at most so many (default 3)")
    parser.add_argument(
        "--grace", type=float, default=120, metavar="S", help="seconds between the first to end badly and the last"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND …", help="as after `mythos`")
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
        setting = _environment(0, arguments.processes, i, arguments.devices) | {COORDINATOR: "127.0.0.1:PORT"}
        lines.append(" ".join(f"{name}={value}" for name, value in setting.items()) + f" {shlex.join(command)} &")
    return [*lines, f"# again after exit code {RESTART} or a death by signal, at most {arguments.restarts} times"]


class _Pod:
    """One attempt. `told`: whether a signal asked the pod itself to stop."""

    def __init__(self, command: list[str], processes: int, devices: int):
        port = _free_port()
        # Sessions of their own: a Ctrl-C reaches them once, through us.
        self.members = [
            subprocess.Popen(
                command, env=os.environ | _environment(port, processes, i, devices), start_new_session=True
            )
            for i in range(processes)
        ]
        self.told = 0
        print(f"pod: started {', '.join(str(member.pid) for member in self.members)}", file=sys.stderr, flush=True)

    def run(self, grace: float) -> int:
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._wait(grace)
        finally:
            for member in self.members:
                if member.poll() is None:
                    member.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self, grace: float) -> int:
        first_failure = None
        while any(member.poll() is None for member in self.members):
            if first_failure is None and any(member.poll() for member in self.members):
                first_failure = time.monotonic()
            if first_failure is not None and time.monotonic() - first_failure > grace:
                print(f"pod: ending what still runs {grace:.0f} s after the first end", file=sys.stderr)
                for member in self.members:
                    member.kill()
            time.sleep(0.05)
        codes = [member.returncode for member in self.members]
        if any(codes):
            print(f"pod: processes ended with {', '.join(map(str, codes))}", file=sys.stderr)
        return INTERRUPTED if self.told == signal.SIGINT else verdict(codes)

    def _pass_on(self, number: int, _: object) -> None:
        self.told = number
        for member in self.members:
            if member.poll() is None:
                member.send_signal(number)


def verdict(codes: Sequence[int]) -> int:
    """One exit code for all processes: 0 if all are; a failure that would come again; else 42."""
    for code in (INTERRUPTED, WRONG_INPUT, FAILED):
        if code in codes:
            return code
    return RESTART if any(codes) else 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
