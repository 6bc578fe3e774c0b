"""A process that runs `mythos` commands one after the other, for tests that damage what it works on.

It is a process of its own so that a hang or a crash is seen from outside, and it has no right to ignore the permissions
of files, even as root. Starting python and jax once for many commands is what makes hundreds of them affordable.
"""

import contextlib
import ctypes
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from mythos_jax import cli
from mythos_jax.runs.orbax_threads import quiet_background_errors

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # of <linux/prctl.h>, <linux/capability.h>


@dataclass(frozen=True)
class Outcome:
    """code: the exit code; None if the command had to be killed. stdout, stderr: all that was written, also by C++."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float


class Victim:
    """Starts the process when it is first needed, and again after a command that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def run(self, words: list[str], folder: Path, seconds: float) -> Outcome:
        """Runs `mythos WORDS` in a folder; kills it after `seconds`."""
        process = self._start() if self.process is None or self.process.poll() is not None else self.process
        began, offsets = time.time(), [self._size(file) for file in self.files]
        process.stdin.write(json.dumps([words, str(folder)]) + "\n")
        process.stdin.flush()
        code = self._answer(process, seconds)
        out, err = (
            Path(file.name).read_bytes()[offset:].decode("utf-8", "replace")
            for file, offset in zip(self.files, offsets, strict=True)
        )
        return Outcome(code, out, err, time.time() - began)

    def _start(self) -> subprocess.Popen:
        self.files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115 - they live as long as the process
        self.pipe, answers = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.victim", str(answers)],
            stdin=subprocess.PIPE,
            stdout=self.files[0],
            stderr=self.files[1],
            pass_fds=[answers],
            text=True,
        )
        os.close(answers)
        assert self._answer(self.process, 120) == 0  # it has imported everything
        return self.process

    def _answer(self, process: subprocess.Popen, seconds: float) -> int | None:
        ready, _, _ = select.select([self.pipe], [], [], seconds)
        line = os.read(self.pipe, 100) if ready else b""
        if line:
            return int(line)
        if not ready:
            process.kill()
        code = process.wait()
        return None if not ready else code

    @staticmethod
    def _size(file) -> int:
        return os.path.getsize(file.name)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            os.close(self.pipe)


def _without_privileges() -> None:
    """Replaces this process by one that, even as root, cannot read or write what permissions forbid."""
    if os.environ.get("VICTIM") == "ready":
        return
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(
            PR_CAPBSET_DROP, capability, 0, 0, 0
        )  # takes effect at exec; refused to who is not root, who needs it not
    os.environ["VICTIM"] = "ready"
    os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz.victim", *sys.argv[1:]])


def _serve(answers: int) -> None:
    os.write(answers, b"0\n")
    for line in sys.stdin:
        words, folder = json.loads(line)
        os.chdir(folder)
        with contextlib.ExitStack() as stack:
            stack.callback(sys.stderr.flush)
            stack.callback(sys.stdout.flush)
            try:
                code = cli.main(words)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
        os.write(answers, f"{code}\n".encode())


if __name__ == "__main__":
    _without_privileges()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    quiet_background_errors()  # what a failed command leaves may speak up during the next one
    _serve(int(sys.argv[1]))
