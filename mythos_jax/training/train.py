"""The training loop: step, log, evaluate, save. How a run starts is in start.py."""

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import Mesh

from mythos_jax.config import Config, save_config
from mythos_jax.data.batch import Batch
from mythos_jax.data.open import Data
from mythos_jax.data.placement import batch_sharding, fitting_batch, local_rows, to_global
from mythos_jax.errors import BadStepError, Interrupted
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.policies import fixed
from mythos_jax.model.mythos import Mythos
from mythos_jax.paths import to_path
from mythos_jax.processes import StopSignal, is_process_zero, of_process_zero, raise_together
from mythos_jax.runs.low_rank import model_variables
from mythos_jax.runs.records import CONFIG_FILE
from mythos_jax.runs.source import keep_source
from mythos_jax.runs.state import Constants, TrainState, eval_variables
from mythos_jax.training.loggers import Logger
from mythos_jax.training.metrics import RunLog, to_json
from mythos_jax.training.profile import Profiler
from mythos_jax.training.resume import checkpoint_metadata
from mythos_jax.training.saving import Saver
from mythos_jax.training.start import (
    check_config,
    finished,
    finished_step,
    hold_run_dir,
    load_constants,
    load_initial,
    open_checkpoints,
    open_local_checkpoints,
    open_run_data,
    starting_state,
)
from mythos_jax.training.step import make_train_step
from mythos_jax.training.watchdog import COMPILING, Watchdog


def train(
    config: Config,
    workdir: str | Path,
    progress: bool = True,
    init_from: str | Path | None = None,
    more_loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Trains until `training.steps`, resuming from the run's newest checkpoint if there is one.

    Prepares the data first if it is missing. Writes config.yaml, metrics.jsonl, events.jsonl and checkpoints/ into
    `workdir`, which may be remote (gs://…). When all processes of a run call it, it trains on all their devices, and
    process 0 prepares, prints and logs.
    init_from: replaces `training.init_from`. more_loggers: are told every line of the log, and are not closed.
    Returns the metrics of the last step; of a finished run those that its log has. Raises ConfigError (something the
    user can correct), BadStepError, SaveError, LockError (another process trains in `workdir`), Interrupted.
    """
    run_dir = to_path(workdir)
    if init_from is not None:
        config = replace(config, training=replace(config.training, init_from=str(init_from)))
    mesh = check_config(config)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.training.hang_timeout))
        lock = stack.enter_context(hold_run_dir(run_dir))  # not watched: it may wait for another start
        watchdog.beat("the start", COMPILING)
        if (step := finished_step(config, mesh, run_dir, watchdog)) is not None:
            return finished(config, run_dir, step)
        # Everything that can be refused is refused before data is prepared, which can take hours.
        initial = load_initial(config, run_dir)
        constants, models = load_constants(config, mesh, run_dir)
        with watchdog.resting():
            data = open_run_data(config, run_dir, progress)
        metadata = checkpoint_metadata(config, data, models)
        checkpoints = stack.enter_context(open_checkpoints(config, run_dir))
        local = stack.enter_context(open_local_checkpoints(config, run_dir))
        state = starting_state(config, mesh, metadata, checkpoints, local, run_dir, initial)

        def save_files() -> None:
            save_config(config, run_dir / CONFIG_FILE)
            data.save_text(run_dir)
            if initial is not None or (config.training.lora.rank and int(state.step) == 0):
                keep_source(config.training.init_from, run_dir, with_text=data.tokenizer is not None)

        # Only now: a resume that is refused leaves the run's config as it was.
        raise_together(lambda: save_files() if is_process_zero() else None)
        if local is not None:
            local.begin(state)
        saver = Saver(checkpoints, local, metadata, lock, watchdog)
        log_here = progress and is_process_zero()
        loop = _Loop(config, mesh, data, run_dir, constants, saver, watchdog, log_here, more_loggers)
        return loop.run(state)


# Steps that were dispatched, with their metrics.
Steps = list[tuple[int, dict[str, jax.Array]]]


class _Loop:
    """The loop proper. Metrics of step n are read once step n + 1 has been dispatched, so the device never waits."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        data: Data,
        run_dir: Any,
        constants: Constants,
        saver: Saver,
        watchdog: Watchdog,
        progress: bool,
        more_loggers: Sequence[Logger],
    ) -> None:
        self.config, self.mesh, self.data, self.more_loggers = config, mesh, data, more_loggers
        self.run_dir, self.constants, self.progress = run_dir, constants, progress
        self.saver, self.watchdog, self.pulse = saver, watchdog, watchdog.pulse
        self.bad_in_a_row = 0

    def run(self, state: TrainState) -> dict[str, Any]:
        t, start = self.config.training, int(state.step)
        teacher = None if self.constants.teacher is None else self.constants.teacher.model
        train_step = make_train_step(self.config, self.mesh)
        self.saver.begin(t, start)
        waiting: Steps = []
        with (
            RunLog(self.config, self.mesh, self.run_dir, start, self.progress, teacher, self.more_loggers) as log,
            StopSignal().watching() as stop,
            Profiler(t.profile_steps, self.run_dir / "profile") as profiler,
            contextlib.closing(log.waiting(self._batches(start))) as batches,
        ):
            self.watchdog.tell(log.hangs)
            # Checkpoints are saved before the evaluation after the same step, which may have been cut short.
            owed = 0 < start < t.steps and self._evaluates(start)
            if owed and of_process_zero(lambda: "held_out_loss" not in log.restored):
                self._evaluate(log, state, start)
            for step in range(start + 1, t.steps + 1):
                self.watchdog.beat(f"reading the rows of step {step}")
                batch = next(batches)
                # The second one waits for the first.
                self.watchdog.beat(f"step {step}", patience=COMPILING if step <= start + 2 else 1)
                with profiler.step(step), self.pulse.waiting():
                    state, metrics = train_step(state, batch, self.constants)
                waiting.append((step, metrics))
                # All processes are told to stop after the same step, whichever of them received the signal.
                stopped = stop.reached()
                saves = self.saver.due(step, stopped is not None)
                evaluates = self._evaluates(step)
                # The metrics of the previous step are there, or nearly so; to read this step's is to wait for it. That
                # is done before a save or an evaluation, because reading raises at a bad step, whose state must not be
                # evaluated or saved; and where steps run while they are dispatched, so that there is no wait.
                with self.pulse.waiting():
                    jax.block_until_ready(waiting[:-1])
                    reads_all = cast(Any, metrics["loss"]).is_ready() or saves or evaluates
                    jax.block_until_ready(waiting if reads_all else [])
                end = len(waiting) - (not reads_all)
                self._read(log, waiting[:end])
                waiting = waiting[end:]
                self._look_around(log, step)
                # The save comes first, so that nothing is lost if the evaluation does not end: the next start makes up
                # for it. After the last step it comes last: a run that has that checkpoint is finished.
                if evaluates and step == t.steps:
                    self._evaluate(log, state, step)
                with log.pause():
                    if saves and not self.saver.save(state, step, log.flush, good=not self.bad_in_a_row):
                        raise self._bad_step(step, "the updated weights are NaN or infinite", "training stopped")
                if evaluates and step < t.steps:
                    self._evaluate(log, state, step)
                if stopped:
                    # Saves run in the background, and the process is about to exit.
                    self.saver.wait()
                    raise Interrupted(stopped, step)
            self.saver.wait()
        return log.last

    def _look_around(self, log: RunLog, step: int) -> None:
        """Tells the other processes that a step has ended, and the log which process is slow: only once the steps
        before are in the log, because W&B drops what comes after a later step."""
        self.pulse.step()
        if slow := self.pulse.slow():
            log.write(step, slow)

    def _batches(self, start: int) -> Generator[dict[str, jax.Array], None, None]:
        """Global batches from `start` on; each process reads the rows that its own devices hold."""
        size, sharding = self.config.training.batch_size, batch_sharding(self.mesh)
        rows = local_rows(sharding, size)
        batches = self.data.train_batches(batch_size=size, seed=self.config.training.seed, start_step=start, rows=rows)
        for batch in batches:
            yield to_global(sharding, size, rows, batch)

    def _read(self, log: RunLog, steps: Steps) -> None:
        """Waits for the metrics of steps and logs them. Raises BadStepError if the run is to stop at one of them."""
        t, read, error = self.config.training, [], None
        for step, metrics in jax.device_get(steps):
            values = {name: to_json(value) for name, value in metrics.items()}
            self.bad_in_a_row = self.bad_in_a_row + 1 if values.pop("bad") else 0
            if self.bad_in_a_row and t.bad_steps == "stop":
                error = self._bad_step(step, _problem(values), "training stopped")
                break
            read.append((step, values))
            if self.bad_in_a_row >= t.max_bad_steps:
                error = self._bad_step(step, _problem(values), f"{self.bad_in_a_row} updates in a row were skipped")
                break
        log.steps(read)
        if error is not None:
            raise error

    def _bad_step(self, step: int, problem: str, outcome: str) -> BadStepError:
        newest = self.saver.checkpoints.newest()  # bad states are not saved, so a new start resumes before the bad step
        saved = f"the newest checkpoint is of step {newest}" if newest is not None else "no checkpoint was saved"
        return BadStepError(f"step {step}: {problem}; {outcome}, {saved}")

    @cached_property
    def held_out(self) -> list[Batch]:
        """Read once, at the first evaluation; `evaluation.max_rows` bounds it."""
        settings = self.config.evaluation
        size = fitting_batch(self.mesh, settings.batch_size)
        batches: list[Batch] = []
        for batch in self.data.held_out_batches(size, settings.max_rows):
            batches.append(batch)
            self.watchdog.beat(f"reading the held-out rows, after {len(batches)} batches")
        return batches

    def _evaluates(self, step: int) -> bool:
        every = self.config.training.evaluate_every
        return every > 0 and step % every == 0

    def _evaluate(self, log: RunLog, state: TrainState, step: int) -> None:
        """Logs the held-out loss after a step."""
        with log.pause():
            self.watchdog.beat(f"the evaluation after step {step}")
            log.write(step, {"held_out_loss": self._held_out_loss(state, step)})

    def _held_out_loss(self, state: TrainState, step: int) -> float:
        """At the model's depth, in nats per token."""
        model = Mythos(self.config.model)
        settings = fixed([self.config.model.loops])  # not the depths drawn in training, so that the losses compare
        trained = eval_variables(state.variables, state.average)
        variables = model_variables(self.config, trained, self.constants)
        held_out = self.held_out

        def beat(i: int) -> None:
            patience = 1 if i else COMPILING
            self.watchdog.beat(f"batch {i + 1} of {len(held_out)} of the evaluation after step {step}", patience)

        measurements, _ = evaluate_depths(
            model, variables, held_out, settings, mesh=self.mesh, bytes_per_token=1, progress=False, before_batch=beat
        )
        return measurements[0].loss


def _problem(values: dict[str, Any]) -> str:
    """What makes a step a bad one."""
    for name in ["loss", "gradient_norm"]:
        if not math.isfinite(values[name]):
            return f"{name} is {values[name]}"
    return f"loss {values['loss']:.4f} is more than training.spike_factor times its running mean"
