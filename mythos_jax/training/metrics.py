"""What a run reports about its steps: metrics, throughput, and the fraction of time spent training."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mythos_jax.chips import peak_flops
from mythos_jax.config import Config, ModelConfig, mean_loops
from mythos_jax.flops import training_flops
from mythos_jax.processes import is_process_zero
from mythos_jax.progress import Progress
from mythos_jax.training.loggers import Logger, open_loggers


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
    ) -> None:
        """start: finished steps. teacher: the model that the run learns from."""
        self._teacher = teacher
        self.config, t = config, config.training
        self.last: dict[str, Any] = {}
        self._loggers: list[Logger] = []
        if is_process_zero():
            self._loggers = open_loggers(t.loggers, run_dir, config.name, restored_step=start)
        self._bar = Progress(t.steps, f"train {config.name}", "step", start=start, show=progress)
        self._devices = mesh.size
        self._throughput, self._goodput = Throughput(peak_flops(mesh.devices.flat)), Goodput()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # closes all of them, even if closing one fails
            for logger in self._loggers:
                stack.callback(logger.close)
            stack.callback(self._bar.close)

    def steps(self, finished: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Counts steps that have ended since the last call, and writes every `log_every`-th of them. They share their
        rates, because nothing is known of when each of them ended."""
        t = self.config.training
        logged = [step for step, _ in finished if step % t.log_every == 0 or step in (1, t.steps)]
        for _, values in finished:
            # With ACT, `mean_loops` counts the loops that contributed to the read-out; training runs all of them.
            loops = mean_loops(self.config) if self.config.model.readout == "act" else values["mean_loops"]
            self._throughput.add(int(values["tokens"]), training_flops(self.config, loops, self._teacher))
        self._goodput.add(len(finished))
        rates = self._throughput.report() | {"goodput": round(self._goodput.fraction(), 4)} if logged else {}
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

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around work between two steps, when no step is running; the time that it takes is in no rate of a step."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._throughput.pause(seconds)
        self._goodput.pause(seconds)

    def write(self, step: int, values: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.write(step, values)

    def flush(self) -> None:
        for logger in self._loggers:
            logger.flush()


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


class Goodput:
    """The fraction of wall time that was spent on training steps: their number times their median duration.

    The rest is compilation, waiting for data, evaluation and saving.
    """

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._steps = 0
        self._durations: deque[float] = deque(maxlen=101)

    def add(self, steps: int) -> None:
        """Counts steps that have ended since the last call."""
        now = time.perf_counter()
        self._durations.extend([(now - self._last) / steps] * steps if steps else [])
        self._last, self._steps = now if steps else self._last, self._steps + steps

    def pause(self, seconds: float) -> None:
        """Leaves out of the next step's duration time in which it did not run. It still counts as wall time."""
        self._last += seconds

    def fraction(self) -> float:
        """Since the start; 0 before the first step has ended."""
        wall = time.perf_counter() - self._start
        return min(self._steps * statistics.median(self._durations) / wall, 1.0) if self._durations else 0.0


def to_json(value: Any) -> Any:
    """A number, or nested lists of numbers rounded to 6 digits."""
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else np.round(array.astype(float), 6).tolist()
