"""What a run reports about its steps: metrics, throughput, step times, and the fraction of time spent training."""

import contextlib
import logging
import statistics
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from mythos_jax.chips import peak_flops
from mythos_jax.config import Config, ModelConfig, mean_loops
from mythos_jax.errors import TrainingError, one_line
from mythos_jax.flops import training_flops
from mythos_jax.processes import is_process_zero, log0
from mythos_jax.progress import Progress
from mythos_jax.training.events import Events
from mythos_jax.training.loggers import Logger, open_jsonl, open_loggers

Batch = TypeVar("Batch")


class RunLog:
    """Reports a run's steps to its loggers and on the progress bar. A context manager that closes them."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        run_dir: Any,
        start: int,
        progress: bool,
        teacher: ModelConfig | None = None,
        more: Sequence[Logger] = (),
    ) -> None:
        """start: finished steps. teacher: the model that the run learns from. more: loggers beside those of the config,
        which the caller closes."""
        self._teacher = teacher
        self.config, t = config, config.training
        self.last: dict[str, Any] = {"step": start}
        self._loggers: list[Logger] = []
        self._more, self._events = more, None
        self.restored: dict[str, Any] = {}  # on process 0, what earlier starts have logged of step `start`
        if is_process_zero():
            log = open_jsonl(run_dir, start)
            self._loggers = [log, *open_loggers(t.loggers, run_dir, config.name, restored_step=start)]
            self.restored = log.restored
            self._events = Events(run_dir, mesh, start, log.last)
        self._bar = Progress(t.steps, f"train {config.name}", "step", start=start, show=progress)
        self._devices, self._local_devices = mesh.size, mesh.local_devices
        self._throughput, self._times = Throughput(peak_flops(mesh.devices.flat)), StepTimes()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with contextlib.ExitStack() as stack:  # closes all of them, even if closing one fails
            if self._events is not None:
                stack.callback(self._events.end, self.last["step"], error)
            for logger in self._loggers:
                stack.callback(_close, logger, error)
            stack.callback(self._bar.close)

    def hangs(self, problem: str) -> None:
        """The watchdog is about to end the process. Called in another thread."""
        if self._events is not None:
            self._events.end(self.last["step"], TrainingError(problem))

    def waiting(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """The same batches; the time until each is there is reported as `data_wait`."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._times.waited(time.perf_counter() - begin)
            yield batch

    def steps(self, finished: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Counts steps that have ended since the last call, and writes every `log_every`-th of them. They share their
        rates, because nothing is known of when each of them ended."""
        t = self.config.training
        logged = [step for step, _ in finished if step % t.log_every == 0 or step in (1, t.steps)]
        for _, values in finished:
            # With ACT, `mean_loops` counts the loops that contributed to the read-out; training runs all of them.
            loops = mean_loops(self.config) if self.config.model.readout == "act" else values["mean_loops"]
            self._throughput.add(int(values["tokens"]), training_flops(self.config, loops, self._teacher))
        self._times.add(len(finished))
        rates = self._rates() if logged else {}
        for step, values in finished:
            row, note = {name: value for name, value in values.items() if name != "tokens"}, ""
            if step in logged:
                row |= rates
                self.write(step, row)
                note = f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tokens/s"
                if "mfu" in row:
                    flops = row["flops_per_second"] / self._devices
                    note += f", {flops / 1e12:.1f} TFLOP/s per device, MFU {row['mfu']:.1%}"
            self._bar.update(note=note)
            self.last = {"step": step, **row}

    def _rates(self) -> dict[str, float]:
        goodput = {"goodput": round(self._times.goodput(), 4)}
        return self._throughput.report() | goodput | self._times.report() | memory_in_use(self._local_devices)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around work between two steps, when no step is running; the time that it takes is in no rate of a step."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._throughput.pause(seconds)
        self._times.pause(seconds)

    def write(self, step: int, values: dict[str, Any]) -> None:
        for logger in [*self._loggers, *self._more]:
            logger.write(step, values)

    def flush(self) -> None:
        for logger in self._loggers:
            logger.flush()


def _close(logger: Logger, error: BaseException | None) -> None:
    """error: what ends the run; it says more than a logger that cannot be closed, and has an exit code of its own."""
    try:
        logger.close()
    except Exception as problem:
        if error is None:
            raise
        log0(f"warning: the last lines of the log may be missing ({one_line(problem, limit=200)})", logging.WARNING)


class Throughput:
    """Tokens and model FLOPs per second of training since the last report.

    Model FLOPs are those of the forward and backward pass, without recomputation (see `flops.training_flops`); MFU is
    their share of what the devices could compute at their peak in the same time.
    """

    def __init__(self, peak_flops: float | None):
        """peak_flops: FLOP/s of all devices together; None where it is not known, and no MFU is reported."""
        self._peak = peak_flops
        self._start, self._tokens, self._flops = time.perf_counter(), 0, 0

    def add(self, tokens: int, flops: int) -> None:
        """Counts a step that has ended."""
        self._tokens += tokens
        self._flops += flops

    def pause(self, seconds: float) -> None:
        """Leaves out time in which no step ran."""
        self._start += seconds

    def report(self) -> dict[str, float]:
        """Rates since the last call, or since the start, without pauses."""
        now = time.perf_counter()
        seconds = now - self._start
        rates: dict[str, float] = {
            "tokens_per_second": round(self._tokens / seconds, 1),
            "flops_per_second": round(self._flops / seconds),
        }
        if self._peak is not None:
            rates["mfu"] = round(self._flops / seconds / self._peak, 4)
        self._start, self._tokens, self._flops = now, 0, 0
        return rates


class StepTimes:
    """How long steps take, how long the loop waits for their batches, and goodput: the fraction of wall time that was
    spent on training steps, their number times their median duration. The rest is compilation, waiting for data,
    evaluation and saving.
    """

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._steps = 0
        self._durations: deque[float] = deque(maxlen=101)
        self._recent: list[float] = []  # durations since the last report
        self._waits: list[float] = []

    def add(self, steps: int) -> None:
        """Counts steps that have ended since the last call."""
        now = time.perf_counter()
        durations = [(now - self._last) / steps] * steps if steps else []
        if self._steps:  # the first of all waits for the compiler
            self._recent += durations
        self._durations.extend(durations)
        self._last, self._steps = now if steps else self._last, self._steps + steps

    def waited(self, seconds: float) -> None:
        """Counts the wait for a batch."""
        self._waits.append(seconds)

    def pause(self, seconds: float) -> None:
        """Leaves out of the next step's duration time in which it did not run. It still counts as wall time."""
        self._last += seconds

    def report(self) -> dict[str, float]:
        """Percentiles since the last call, and the mean wait for a batch; without what nothing is known of."""
        found: dict[str, float] = {}
        if self._recent:
            recent = self._recent if len(self._recent) > 1 else 2 * self._recent  # `quantiles` wants two
            tenths = statistics.quantiles(recent, n=10, method="inclusive")
            values = {"p50": tenths[4], "p90": tenths[8], "max": max(recent)}
            found |= {f"step_seconds_{name}": round(value, 6) for name, value in values.items()}
        if self._waits:
            found["data_wait"] = round(statistics.fmean(self._waits), 6)
        self._recent, self._waits = [], []
        return found

    def goodput(self) -> float:
        """Since the start; 0 before the first step has ended."""
        wall = time.perf_counter() - self._start
        return min(self._steps * statistics.median(self._durations) / wall, 1.0) if self._durations else 0.0


def memory_in_use(devices: Iterable[jax.Device]) -> dict[str, int]:
    """Bytes in use and at their peak so far, and what a program may have, of the device with the highest peak; nothing
    where devices do not say, such as CPUs. It asks the allocator, and waits for no step."""
    names = {"hbm_bytes": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use", "hbm_limit_bytes": "bytes_limit"}
    found = []
    for device in devices:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a runtime that has no such call
            found.append(device.memory_stats() or {})
    fullest = max(found, key=lambda stats: stats.get("peak_bytes_in_use", 0), default={})
    return {name: fullest[key] for name, key in names.items() if fullest.get(key, -1) >= 0}


def to_json(value: Any) -> Any:
    """A number, or nested lists of numbers rounded to 6 digits."""
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else np.round(array.astype(float), 6).tolist()
