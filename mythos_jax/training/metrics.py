"""Where a run's numbers go: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked for."""

import importlib
import json
import os
import secrets
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote


class Writer(Protocol):
    """Takes the numbers of a step; values are numbers or nested lists."""

    def write(self, step: int, metrics: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...  # before a checkpoint is saved: a resumed run does not write these steps again

    def close(self) -> None: ...


class MetricsLog:
    """Appends to `metrics.jsonl`, one JSON object a line, each with a `step`."""

    def __init__(self, path: str | Path, restored_step: int = 0):
        """Drops lines after `restored_step`, and a last line that a kill cut short."""
        self.path = Path(path)
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= restored_step]
            beside = self.path.with_suffix(".tmp")
            beside.write_text("".join(f"{line}\n" for line in kept))
            os.replace(beside, self.path)
        self._file = self.path.open("a")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class RemoteMetricsLog:
    """A log in an object store, where nothing can be appended: kept on this disk, copied there as a whole."""

    EVERY = 60  # seconds between two copies

    def __init__(self, path: Any, restored_step: int = 0):
        self.path, self._folder = path, tempfile.TemporaryDirectory(prefix="mythos-log-")
        local = Path(self._folder.name) / path.name
        if path.exists():
            local.write_bytes(path.read_bytes())
        self._log, self._copied = MetricsLog(local, restored_step), time.monotonic()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._log.write(step, metrics)
        if time.monotonic() - self._copied > self.EVERY:
            self.flush()

    def flush(self) -> None:
        self.path.write_bytes(self._log.path.read_bytes())
        self._copied = time.monotonic()

    def close(self) -> None:
        self._log.close()
        self.flush()
        self._folder.cleanup()


class TensorBoardWriter:
    """Scalars as TensorBoard event files, a new one each start."""

    def __init__(self, folder: Any, restored_step: int = 0):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._file = Event, Summary, EventFileWriter(str(folder))
        if restored_step:
            # Tells readers to forget what earlier files say of later steps, which are about to run again.
            start = SessionLog(status=SessionLog.START)
            self._file.add_event(Event(wall_time=time.time(), step=restored_step + 1, session_log=start))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _scalars(metrics).items()]
        self._file.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._file.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class WandbWriter:
    """Scalars to Weights & Biases, whose own variables choose the rest (WANDB_MODE=offline, WANDB_PROJECT, …).

    Every start of a run goes on under the id that is kept in its folder. Raises ConfigError where W&B refuses.
    """

    def __init__(self, folder: Any, name: str):
        import wandb

        kept = folder / "wandb_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mythos_jax"),
                name=name,
                id=kept.read_text(),
                dir=None if is_remote(folder) else str(folder),  # None: under the working directory
                resume="allow",
            )
        except wandb.errors.Error as error:
            why = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"training.loggers: wandb refused ({why}); allowed: `wandb login`, or WANDB_MODE=offline"
            ) from error

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log(_scalars(metrics), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def check_writers(names: tuple[str, ...]) -> None:
    """Raises ConfigError where one is not installed: to be asked before anything is done."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ConfigError(
                f"training.loggers: {name} is not installed; allowed: pip install 'mythos-jax[{name}]'"
            ) from None


def open_writers(names: tuple[str, ...], workdir: Any, run_name: str, restored_step: int) -> list[Writer]:
    """The log and the writers asked for, which are installed (see `check_writers`)."""
    makers = {
        "tensorboard": lambda: TensorBoardWriter(workdir / "tensorboard", restored_step),
        "wandb": lambda: WandbWriter(workdir, run_name),
    }
    log = RemoteMetricsLog if is_remote(workdir) else MetricsLog
    return [log(workdir / "metrics.jsonl", restored_step), *(makers[name]() for name in names)]


def plain(value: Any) -> Any:
    """A number, or nested lists of numbers to 6 digits, fit for JSON."""
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else np.round(array.astype(float), 6).tolist()


class Goodput:
    """The share of wall time that trained: steps times their median duration, over the time since the start.

    Compilation, waiting for data, evaluation and saving are what is left.
    """

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._steps = 0
        self._durations: deque[float] = deque(maxlen=101)

    def step(self) -> None:
        """Notes that a step has ended."""
        now = time.perf_counter()
        self._durations.append(now - self._last)
        self._last, self._steps = now, self._steps + 1

    def share(self) -> float:
        wall = time.perf_counter() - self._start
        return min(self._steps * statistics.median(self._durations) / wall, 1.0) if self._durations else 0.0


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
