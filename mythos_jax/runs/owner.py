"""Who trains in a run directory, as its lock file says."""

import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from mythos_jax.json_text import parse_json

LOCK_FILE = "lock.json"
# Seconds between two renewals by the owner, and without one after which an owner elsewhere counts as dead.
RENEW, PATIENCE = 10.0, 35.0


@dataclass(frozen=True)
class Owner:
    """What the lock file holds. place: the machine, its boot and the container; started: of the process, since boot."""

    token: str
    host: str
    place: str
    pid: int
    started: str
    renewals: int = 0
    renewed: float = 0.0

    @classmethod
    def this_process(cls) -> "Owner":
        host = socket.gethostname()
        place = " ".join([host, _read_text("/proc/sys/kernel/random/boot_id"), _read_link("/proc/self/ns/pid")])
        started = _process_start(os.getpid()) or ""
        return cls(secrets.token_hex(8), host, place, os.getpid(), started, renewed=time.time())

    def is_alive(self, place: str) -> bool | None:
        """Whether the process still runs; None if it is in another place, from where that cannot be seen."""
        if self.place != place:
            return None
        started = _process_start(self.pid)
        # An equal number may belong to a process that started later.
        return started is not None and (started == self.started or "" in (started, self.started))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, seen {max(0, time.time() - self.renewed):.0f} s ago"


def parse_owner(content: bytes) -> Owner | None:
    """None for a file that is damaged or was not written in full."""
    try:
        return Owner(**parse_json(content))
    except (ValueError, TypeError):
        return None


def _process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it has ended, "" where this cannot be seen."""
    try:
        # The name of the program, in parentheses, may contain spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:  # no Linux, or the process of another user, which may be hidden
        return "" if _exists(pid) else None
    return None if fields[0] in "ZX" else fields[19]  # Z, X: dead, and not yet collected by its parent


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another error: it is of another user
    return True


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _read_link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
