"""events.jsonl: when a run started, restarted and ended, and why."""

import signal
import socket
import time
from typing import Any

from jax.sharding import Mesh

from mythos_jax.errors import Interrupted, one_line
from mythos_jax.processes import log0
from mythos_jax.runs.records import EVENTS_FILE, append_event

_LONGEST_MESSAGE = 300


class Events:
    """Writes one start of a run and its end (see `runs/records.py`). A file that cannot be written stops no run."""

    def __init__(self, run_dir: Any, mesh: Mesh, step: int, last: dict[str, Any]) -> None:
        """step: that the run goes on after. last: the last line of the log of earlier starts, if there is one."""
        self._run_dir = run_dir
        reached = max(last.get("step", 0), step)
        before = {"reached_time": last["time"]} if "time" in last else {}
        devices = mesh.devices.flat
        where = {
            "host": socket.gethostname(),
            "processes": len({device.process_index for device in devices}),
            "devices": mesh.size,
            "device_kind": mesh.devices.flat[0].device_kind,
        }
        self._write("start", step=step, reached=reached, **before, **where)

    def end(self, step: int, error: BaseException | None) -> None:
        """step: the last that was logged or read. error: what ends the run; None if it is finished."""
        if error is None:
            self._write("end", step=step, how="finished")
        elif isinstance(error, Interrupted):
            self._write("end", step=step, how="stopped", message=signal.Signals(error.signal).name)
        else:
            message = one_line(error, _LONGEST_MESSAGE) or type(error).__name__
            self._write("end", step=step, how="failed", message=message)

    def _write(self, event: str, **fields: Any) -> None:
        try:
            append_event(self._run_dir, event, time.time(), **fields)
        except Exception as error:  # the clients of object stores have exceptions of their own
            reason = getattr(error, "strerror", None) or one_line(error, _LONGEST_MESSAGE)
            log0(f"{self._run_dir / EVENTS_FILE}: cannot be written ({reason}); the run goes on without this line")
