"""Where a run's metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases on request."""

import errno
import importlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mythos_jax.errors import ConfigError, TrainingError, one_line
from mythos_jax.json_text import without_nan
from mythos_jax.paths import copy_tree, is_remote, write_whole
from mythos_jax.processes import log0
from mythos_jax.runs.records import METRICS_FILE, read_log

# Seconds between two copies of a growing file to an object store, where nothing can be appended.
COPY_EVERY = 60

# The package that each logger needs; it comes with the extra that has the logger's name.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Logger(Protocol):
    """Records the metrics of a step; values are numbers or nested lists of numbers."""

    def write(self, step: int, metrics: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...  # before every checkpoint: a run that resumes from it does not write these steps again

    def close(self) -> None: ...


class JsonlLogger:
    """Appends to `metrics.jsonl`, one JSON object per line, each with a `step` and the `time` in seconds since 1970.
    NaN and infinity become null, because JSON has no word for them.

    last: the last line of an earlier start, dropped or not; empty if there is none. restored: what earlier starts have
    logged of `restored_step`.
    """

    def __init__(self, path: str | Path, restored_step: int = 0, shown_path: Any = None):
        """Drops lines after `restored_step` and lines that are damaged, and logs how many of these there were.

        shown_path: what log lines call the file, if not `path`.
        """
        self.path, self.last, self.restored = Path(path), dict[str, Any](), dict[str, Any]()
        if self.path.exists():
            records, damaged = read_log(self.path)
            self.last = records[-1][0] if records else {}
            if damaged:
                lines = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
                log0(f"{shown_path or path}: left out what is damaged, {len(damaged)} lines ({lines})")
            for record, _ in records:
                self.restored |= record if record["step"] == restored_step else {}
            past = [line + b"\n" for record, line in records if record["step"] <= restored_step]
            write_whole(self.path, b"".join(past))
        self._file = self.path.open("ab", buffering=0)  # so that no half line is left to be written on closing

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        line = json.dumps(without_nan(row), allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise TrainingError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class RemoteJsonlLogger:
    """`metrics.jsonl` in an object store: written to a local disk and copied in full."""

    def __init__(self, path: Any, restored_step: int = 0):
        self.path, self._folder = path, tempfile.TemporaryDirectory(prefix="mythos-log-")
        local = Path(self._folder.name) / path.name
        if path.exists():
            local.write_bytes(path.read_bytes())
        self._log, self._copied = JsonlLogger(local, restored_step, path), time.monotonic()
        self.last, self.restored = self._log.last, self._log.restored

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._log.write(step, metrics)
        if time.monotonic() - self._copied > COPY_EVERY:
            self.flush()

    def flush(self) -> None:
        self.path.write_bytes(self._log.path.read_bytes())
        self._copied = time.monotonic()

    def close(self) -> None:
        self._log.close()
        self.flush()
        self._folder.cleanup()


class TensorBoardLogger:
    """Scalars as TensorBoard event files, one per start of the run.

    A background thread writes them, within a second. For an object store they are copied as in `RemoteJsonlLogger`.
    """

    def __init__(self, folder: Any, restored_step: int = 0):
        from tensorboardX import SummaryWriter

        self._folder, self._copied = folder, time.monotonic()
        self._local = tempfile.TemporaryDirectory(prefix="mythos-tensorboard-") if is_remote(folder) else None
        self._writer = SummaryWriter(
            self._local.name if self._local else str(folder),
            # Hides what earlier files contain about later steps, which are about to run again.
            purge_step=restored_step + 1,
            flush_secs=1,
            # Files are read in the order of their names, which otherwise contain whole seconds only.
            filename_suffix=f".{time.time_ns()}",
        )

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in _scalars(metrics).items():
            self._writer.add_scalar(name, value, step)
        if self._local and time.monotonic() - self._copied > COPY_EVERY:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._copy()

    def close(self) -> None:
        self._writer.close()
        self._copy()
        if self._local:
            self._local.cleanup()

    def _copy(self) -> None:
        if self._local:
            copy_tree(Path(self._local.name), self._folder)
            self._copied = time.monotonic()


class WandbLogger:
    """Scalars to Weights & Biases; its environment variables configure the rest (WANDB_MODE=offline, WANDB_PROJECT, …).

    Every start of a run continues the W&B run whose id is stored in the run's directory. Raises ConfigError if W&B
    refuses.
    """

    def __init__(self, folder: Any, name: str):
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mythos_jax"),
                name=name,
                id=_wandb_id(folder / "wandb_id"),
                dir=None if is_remote(folder) else str(folder),  # None: under the working directory
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"training.loggers: wandb refused ({one_line(error)}); allowed: `wandb login`, or WANDB_MODE=offline"
            ) from error

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log(_scalars(metrics), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def check_loggers(names: tuple[str, ...]) -> None:
    """Raises ConfigError if a logger's package is not installed; call this before any work is done."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise ConfigError(
                f"training.loggers: {name} is not installed; allowed: pip install '.[{name}]' in the checkout"
            ) from None


def open_jsonl(workdir: Any, restored_step: int) -> JsonlLogger | RemoteJsonlLogger:
    """The run's `metrics.jsonl`."""
    log = RemoteJsonlLogger if is_remote(workdir) else JsonlLogger
    return log(workdir / METRICS_FILE, restored_step)


def open_loggers(names: tuple[str, ...], workdir: Any, run_name: str, restored_step: int) -> list[Logger]:
    """The loggers of `training.loggers`, which must be installed (see `check_loggers`)."""
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(workdir / "tensorboard", restored_step),
        "wandb": lambda: WandbLogger(workdir, run_name),
    }
    return [makers[name]() for name in names]


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _wandb_id(file: Any) -> str:
    """The id stored in the run's directory; a new one if there is none, or if the file is damaged."""
    if file.exists():
        stored = file.read_bytes()
        if re.fullmatch(rb"[0-9a-f]{16}", stored):
            return str(stored, "ascii")
        log0(f"{file}: damaged; the run gets a new one at wandb")
    new = secrets.token_hex(8)
    write_whole(file, new.encode())
    return new
