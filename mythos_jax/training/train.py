"""The training loop: prepare, restore, step, log, save."""

import contextlib
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from mythos_jax.config import Config, ModelConfig, save_config
from mythos_jax.data.batch import Batch
from mythos_jax.data.open import Data, open_data
from mythos_jax.data.placement import batch_sharding, check_batch, local_rows, to_global
from mythos_jax.errors import BadStepError, ConfigError, Interrupted
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.policies import fixed
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.mythos import Mythos
from mythos_jax.paths import to_path
from mythos_jax.processes import StopSignal, is_process_zero, log0, process_zero_first
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.runs.load import load_model, place_variables
from mythos_jax.runs.state import TrainState, eval_variables
from mythos_jax.sharding import check_sharded, make_mesh
from mythos_jax.training.loggers import check_loggers
from mythos_jax.training.metrics import RunLog, to_json
from mythos_jax.training.profile import Profiler
from mythos_jax.training.resume import announce_changes, check_resume, checkpoint_metadata
from mythos_jax.training.step import init_state, make_train_step
from mythos_jax.typed import differences, to_dict


def train(
    config: Config, workdir: str | Path, progress: bool = True, init_from: str | Path | None = None
) -> dict[str, Any]:
    """Trains until `training.steps`, resuming from the run's newest checkpoint if there is one.

    Prepares the data first if it is missing. Writes config.yaml, metrics.jsonl and checkpoints/ into `workdir`, which
    may be remote (gs://…). When all processes of a run call it, it trains on all their devices, and process 0
    prepares, prints and logs.
    init_from: a run or a pretrained model whose weights a run without checkpoints starts from.
    Returns the metrics of the last step. Raises ConfigError (something the user can correct), BadStepError, SaveError,
    Interrupted.
    """
    run_dir = to_path(workdir)
    # Everything that can be refused is refused before data is prepared, which can take hours.
    check_loggers(config.training.loggers)
    mesh = make_mesh(config.mesh)
    check_sharded(mesh, abstract_variables(config.model))
    check_batch(mesh, config.training.batch_size, "training.batch_size")
    data = process_zero_first("data", lambda: _open_data(config, run_dir, progress), identity=lambda d: str(d.identity))

    with contextlib.closing(Checkpoints(run_dir / "checkpoints", config.training.keep_checkpoints)) as checkpoints:
        # Processes that saw different checkpoints would restore different steps.
        process_zero_first(f"{run_dir}/checkpoints", checkpoints.steps, identity=str)
        state = _starting_state(config, mesh, data, checkpoints, run_dir, init_from)
        # Only now: a resume that is refused leaves the run's config as it was.
        if is_process_zero():
            save_config(config, run_dir / "config.yaml")
        return _Loop(config, mesh, data, checkpoints, run_dir, progress and is_process_zero()).run(state)


def _open_data(config: Config, run_dir: Any, progress: bool) -> Data:
    """The data, which process 0 prepares if it is missing. Process 0 also makes the run directory."""
    first = is_process_zero()
    if first:
        _check_run_dir(run_dir)
    elif not run_dir.is_dir():
        raise ConfigError(
            f"{run_dir}: process {jax.process_index()} cannot see the directory that process 0 made; allowed: a "
            "--workdir that all processes share"
        )
    data = open_data(config, progress and first, prepare=first)
    # After the data, so that a config whose data is refused leaves no empty run behind.
    if first:
        run_dir.mkdir(parents=True, exist_ok=True)
    return data


def _check_run_dir(run_dir: Any) -> None:
    """Raises ConfigError rather than write a run among someone else's files."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: is a file; allowed: a run directory, or a path that does not exist")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"{run_dir}: contains files but no run (no config.yaml); allowed: a run directory, or a path that does not "
            "exist"
        )


def _starting_state(
    config: Config, mesh: Mesh, data: Data, checkpoints: Checkpoints, run_dir: Any, init_from: str | Path | None
) -> TrainState:
    """The newest checkpoint, else the weights of `init_from`, else weights drawn from the seed."""
    state = init_state(config, mesh)  # also tells the checkpoint where each restored array belongs on this mesh
    if checkpoints.newest() is not None:
        current = checkpoint_metadata(config, data)
        state, saved = checkpoints.restore_newest(state, lambda saved: check_resume(saved, current, run_dir))
        announce_changes(saved, current, int(state.step))
        log0(f"resuming {run_dir} after step {int(state.step)}")
    elif init_from is not None:
        state = state.replace(variables=_initial_variables(config, mesh, init_from))
    return state


def _initial_variables(config: Config, mesh: Mesh, path: str | Path) -> dict[str, Any]:
    """The weights of another model with the same shapes; other fields that differ are announced."""
    loaded = load_model(path)
    changed = differences(to_dict(loaded.config.model), to_dict(config.model), "model")
    if _shapes(loaded.config.model) != _shapes(config.model):
        fields = "; ".join(f"{name} is {old!r}, not {new!r}" for name, (old, new) in changed.items())
        raise ConfigError(f"{path}: its weights do not fit this config ({fields})")
    for name, (old, new) in changed.items():
        log0(f"{name} is {old!r} in {path}, {new!r} in this run")
    return place_variables(config.model, mesh, loaded.variables)


def _shapes(model: ModelConfig) -> dict[str, Any]:
    return jax.tree.map(lambda x: x.shape, nn.unbox(abstract_variables(model)))


class _Loop:
    """The loop proper. Metrics of step n are read once step n + 1 has been dispatched, so the device never waits."""

    def __init__(
        self, config: Config, mesh: Mesh, data: Data, checkpoints: Checkpoints, run_dir: Any, progress: bool
    ) -> None:
        self.config, self.mesh, self.data, self.checkpoints = config, mesh, data, checkpoints
        self.run_dir, self.progress = run_dir, progress
        self.metadata = checkpoint_metadata(config, data)

    def run(self, state: TrainState) -> dict[str, Any]:
        t, start = self.config.training, int(state.step)
        train_step = make_train_step(self.config, self.mesh)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        with (
            RunLog(self.config, self.mesh, self.run_dir, start, self.progress) as log,
            StopSignal().watching() as stop,
            Profiler(t.profile_steps, self.run_dir / "profile") as profiler,
        ):
            # Not strict: the batches are endless.
            for step, batch in zip(range(start + 1, t.steps + 1), self._batches(start), strict=False):
                with profiler.step(step):
                    state, metrics = train_step(state, batch)
                # Reading this step's metrics would wait for it; those of the previous step are done or nearly so.
                if pending:
                    self._read(log, *pending)
                pending = (step, metrics)
                # All processes are told to stop after the same step, whichever of them received the signal.
                stopped = stop.reached(step)
                saves = step % t.checkpoint_every == 0 or step == t.steps or stopped
                evaluates = t.evaluate_every and step % t.evaluate_every == 0
                if saves or evaluates:
                    # First, because it raises at a bad step: its state must not be evaluated or saved.
                    self._read(log, *pending)
                    pending = None
                if evaluates:
                    log.write(step, {"held_out_loss": self._evaluate(state)})
                if saves:
                    # Before the checkpoint exists: a run that resumes from it does not log these steps again.
                    log.flush()
                    self.checkpoints.save(state, self.metadata)
                if stopped:
                    # Saves run in the background, and the process is about to exit.
                    self.checkpoints.wait()
                    raise Interrupted(stopped, step)
            self.checkpoints.wait()
        return log.last

    def _batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Global batches from `start` on; each process reads the rows that its own devices hold."""
        size, sharding = self.config.training.batch_size, batch_sharding(self.mesh)
        rows = local_rows(sharding, size)
        batches = self.data.train_batches(batch_size=size, seed=self.config.training.seed, start_step=start, rows=rows)
        for batch in batches:
            yield to_global(sharding, size, rows, batch)

    def _read(self, log: RunLog, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for the step's metrics and logs them. Raises BadStepError if the run is to stop at bad steps."""
        values = {name: to_json(value) for name, value in jax.device_get(metrics).items()}
        if values.pop("bad") and self.config.training.bad_steps == "stop":
            raise self._bad_step(step, values)
        log.step(step, values)

    def _bad_step(self, step: int, values: dict[str, Any]) -> BadStepError:
        newest = self.checkpoints.newest()  # bad states are not saved, so a new start resumes before the bad step
        saved = f"the newest checkpoint is of step {newest}" if newest is not None else "no checkpoint was saved"
        for name in ["loss", "gradient_norm"]:
            if not math.isfinite(values[name]):
                return BadStepError(f"step {step}: {name} is {values[name]}; training stopped, {saved}")
        spike = f"loss {values['loss']:.4f} is more than training.spike_factor times its running mean"
        return BadStepError(f"step {step}: {spike}; training stopped, {saved}")

    @cached_property
    def held_out(self) -> list[Batch]:
        """Read once, at the first evaluation; `evaluation.max_rows` bounds it."""
        settings = self.config.evaluation
        return list(self.data.held_out_batches(settings.batch_size, settings.max_rows))

    def _evaluate(self, state: TrainState) -> float:
        """Held-out loss at the model's depth, in nats per token."""
        model = Mythos(self.config.model)
        settings = fixed([self.config.model.loops])  # not the depths drawn in training, so that the losses compare
        variables = eval_variables(state.variables, state.average)
        measurements, _ = evaluate_depths(
            model, variables, self.held_out, settings, mesh=self.mesh, bytes_per_token=1, progress=False
        )
        return measurements[0].loss
