"""The training loop: prepare, restore, step, log, save."""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from tqdm import tqdm

from mythos_jax.config import Config, ModelConfig, TrainingConfig, save_config
from mythos_jax.config.model import SPEED_FIELDS
from mythos_jax.data.batch import Batch
from mythos_jax.data.open import Data, open_data
from mythos_jax.data.placement import batch_sharding, check_batch, local_rows, to_global
from mythos_jax.errors import BadStepError, ConfigError, Interrupted
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.policies import fixed
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.mythos import Mythos
from mythos_jax.paths import copy_tree, is_remote, to_path
from mythos_jax.processes import StopSignal, is_process_zero, log0, process_zero_first
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.runs.load import load_model, place
from mythos_jax.runs.state import TrainState, evaluated
from mythos_jax.sharding import check_sharded, make_mesh
from mythos_jax.training.metrics import Goodput, check_writers, open_writers, plain
from mythos_jax.training.step import init_state, make_train_step
from mythos_jax.typed import differences, to_dict, upgrade


def train(
    config: Config, workdir: str | Path, progress: bool = True, init_from: str | Path | None = None
) -> dict[str, Any]:
    """Trains until `training.steps`, from the run's newest checkpoint where there is one.

    Prepares the data first when it is missing. Writes config.yaml, metrics.jsonl and checkpoints/ into `workdir`, a
    path that may be remote (gs://…). Called by all processes of a run (see processes.py), it trains on all their
    devices; the first one prepares, prints and logs.
    init_from: a run or a pretrained model whose weights a run without checkpoints starts from.
    Returns the metrics of the last step. Raises ConfigError (what the user can mend), BadStepError, SaveError,
    Interrupted.
    """
    workdir = to_path(workdir)
    check_writers(config.training.loggers)
    mesh = make_mesh(config.mesh)
    check_sharded(mesh, abstract_variables(config.model))
    check_batch(mesh, config.training.batch_size, "training.batch_size")
    data = process_zero_first(
        "data", lambda: _open(config, workdir, progress), identity=lambda data: str(data.identity)
    )

    checkpoints = Checkpoints(workdir / "checkpoints", config.training.keep_checkpoints)
    with contextlib.closing(checkpoints):
        process_zero_first(f"{workdir}/checkpoints", checkpoints.steps, identity=str)
        state = init_state(config, mesh)
        if checkpoints.newest() is not None:
            now = run_meta(config, data)
            state, saved = checkpoints.restore_newest(state, lambda saved: _check_resume(saved, now, workdir))
            _announce_changes(saved, now, int(state.step))
            log0(f"resuming {workdir} after step {int(state.step)}")
        elif init_from is not None:
            state = state.replace(variables=_initial_variables(config, mesh, init_from))
        if is_process_zero():
            save_config(config, workdir / "config.yaml")
        return _Loop(config, mesh, data, checkpoints, workdir, progress and is_process_zero()).run(state)


def _open(config: Config, workdir: Any, progress: bool) -> Data:
    """The data, prepared by the first process where it is missing; also makes the run directory."""
    first = is_process_zero()
    if first:
        _check_workdir(workdir)
    elif not workdir.is_dir():
        raise ConfigError(
            f"{workdir}: process {jax.process_index()} does not see it, process 0 has made it; allowed: a --workdir "
            "that all processes share"
        )
    data = open_data(config, progress and first, prepare=first)
    if first:
        workdir.mkdir(parents=True, exist_ok=True)
    return data


class _Loop:
    """The loop proper. Metrics of step n are read once step n + 1 is on its way, so that the device never waits."""

    def __init__(self, config, mesh, data, checkpoints, workdir, progress):
        self.config, self.mesh, self.data, self.checkpoints = config, mesh, data, checkpoints
        self.workdir, self.progress = workdir, progress
        self.meta = run_meta(config, data)
        self.last: dict[str, Any] = {}

    def run(self, state: TrainState) -> dict[str, Any]:
        t, start = self.config.training, int(state.step)
        step_fn = make_train_step(self.config, self.mesh)
        self.goodput, self.clock, self.tokens = Goodput(), time.perf_counter(), 0
        pending: tuple[int, dict[str, jax.Array]] | None = None
        with contextlib.ExitStack() as stack:
            writers = []
            if is_process_zero():
                writers = open_writers(t.loggers, self.workdir, self.config.name, restored_step=start)
            self.writers = [stack.enter_context(contextlib.closing(writer)) for writer in writers]
            title = f"train {self.config.name}"
            self.bar = stack.enter_context(
                tqdm(total=t.steps, initial=start, desc=title, unit="step", disable=not self.progress)
            )
            stop = stack.enter_context(StopSignal().watching())
            profiler = stack.enter_context(_Profiler(t.profile_steps, self.workdir / "profile"))
            for step, batch in zip(range(start + 1, t.steps + 1), self._batches(start), strict=False):
                with profiler.step(step):
                    state, metrics = step_fn(state, batch)
                if pending:
                    self._read(*pending)
                pending = (step, metrics)
                stopped = stop.reached(step)
                saves = step % t.checkpoint_every == 0 or step == t.steps or stopped
                evaluates = t.evaluate_every and step % t.evaluate_every == 0
                if saves or evaluates:
                    # A state is saved only when the step that made it was sound.
                    self._read(*pending)
                    pending = None
                if evaluates:
                    self._write(step, {"held_out_loss": self._evaluate(state)})
                if saves:
                    for writer in self.writers:
                        writer.flush()
                    self.checkpoints.save(state, self.meta)
                if stopped:
                    self.checkpoints.wait()
                    raise Interrupted(stopped, step)
            self.checkpoints.wait()
        return self.last

    def _batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        size, sharding = self.config.training.batch_size, batch_sharding(self.mesh)
        rows = local_rows(sharding, size)
        batches = self.data.train_batches(batch_size=size, seed=self.config.training.seed, start_step=start, rows=rows)
        for batch in batches:
            yield to_global(sharding, size, rows, batch)

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: plain(value) for name, value in jax.device_get(metrics).items()}
        if values.pop("bad") and self.config.training.bad_steps == "stop":
            raise self._bad_step(step, values)
        self.goodput.step()
        self.tokens += int(values.pop("tokens"))
        self.bar.update()
        every = self.config.training.log_every
        if step % every == 0 or step in (1, self.config.training.steps):
            now = time.perf_counter()
            values["tokens_per_second"] = round(self.tokens / (now - self.clock), 1)
            values["goodput"] = round(self.goodput.share(), 4)
            self.clock, self.tokens = now, 0
            self._write(step, values)
            self.bar.set_postfix(loss=f"{values['loss']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}")
        self.last = {"step": step, **values}

    def _write(self, step: int, values: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(step, values)

    def _bad_step(self, step: int, values: dict[str, Any]) -> BadStepError:
        newest = self.checkpoints.newest()
        stands = f"the checkpoint of step {newest} stands" if newest is not None else "no checkpoint was made"
        for name in ["loss", "gradient_norm"]:
            if not math.isfinite(values[name]):
                return BadStepError(f"step {step}: {name} is {values[name]}; training stopped, {stands}")
        spike = f"loss {values['loss']:.4f} is over training.spike_factor times its running mean"
        return BadStepError(f"step {step}: {spike}; training stopped, {stands}")

    @cached_property
    def held_out(self) -> list[Batch]:
        """Read once, at the first evaluation; `evaluation.max_rows` bounds it."""
        settings = self.config.evaluation
        return list(self.data.held_out_batches(settings.batch_size, settings.max_rows))

    def _evaluate(self, state: TrainState) -> float:
        """Held-out nats per token at the model's depth."""
        model = Mythos(self.config.model)
        settings = fixed([self.config.model.loops])
        variables = evaluated(state.variables, state.average)
        measurements, _ = evaluate_depths(
            model, variables, self.held_out, settings, mesh=self.mesh, bytes_per_token=1, progress=False
        )
        return measurements[0].loss


class _Profiler:
    """A profiler trace of the steps from `first` to `last`, for TensorBoard or Perfetto; of none if `span` is ()."""

    def __init__(self, span: tuple[int, ...], folder: Any):
        self.span, self.folder, self.running = span, folder, False
        self.local = Path(tempfile.mkdtemp(prefix="mythos-profile-")) if span and is_remote(folder) else folder

    def __enter__(self):
        return self

    def __exit__(self, *_: Any) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            if self.local != self.folder:
                copy_tree(self.local, self.folder)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        if self.span and self.span[0] <= step <= self.span[1] and not self.running:
            jax.profiler.start_trace(str(self.local))
            self.running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self.running and step >= self.span[1]:
            self.__exit__()


def _initial_variables(config: Config, mesh: Mesh, path: str | Path) -> dict[str, Any]:
    """The weights of another model, for this config's; fields that differ without changing a shape are announced."""
    loaded = load_model(path)
    changed = differences(to_dict(loaded.config.model), to_dict(config.model), "model")
    if _shapes(loaded.config.model) != _shapes(config.model):
        fields = "; ".join(f"{name} is {old!r} there, {new!r} here" for name, (old, new) in changed.items())
        raise ConfigError(f"{path}: its weights do not fit this config ({fields})")
    for name, (old, new) in changed.items():
        log0(f"{name} is {old!r} in {path}, {new!r} here")
    return place(config.model, mesh, loaded.variables)


def _shapes(model: ModelConfig) -> dict[str, Any]:
    return jax.tree.map(lambda x: x.shape, nn.unbox(abstract_variables(model)))


def run_meta(config: Config, data: Data) -> dict[str, Any]:
    """What a checkpoint remembers of its run; a resume under another model, batch, seed or data is refused."""
    return {
        "model": to_dict(config.model),
        "training": to_dict(config.training),
        "data": data.identity,
    }


# Fields whose change on resume would make the run neither the old one nor a new one (beginnings of their names), and
# those among them that change nothing but speed and memory.
_FIXED = ("model.", "data", "training.batch_size", "training.seed", "training.optimizer", "training.ema_decay")
_FREE = tuple(f"model.{name}" for name in SPEED_FIELDS)


def _changes(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, old and new, by dotted name; those of an earlier version go by their present names."""
    upgraded = {
        "model": upgrade(ModelConfig, saved["model"]),
        "training": upgrade(TrainingConfig, saved["training"]),
        "data": saved["data"],
    }
    return differences(upgraded, now)


def _check_resume(saved: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    changed = _changes(saved, now)
    refused = {k: v for k, v in changed.items() if k.startswith(_FIXED) and k not in _FREE}
    if refused:
        fields = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in refused.items())
        raise ConfigError(
            f"{workdir}: cannot resume, the run was made with other settings ({fields}); use a new --workdir"
        )


def _announce_changes(saved: dict[str, Any], now: dict[str, Any], step: int) -> None:
    for name, (old, new) in _changes(saved, now).items():
        note = ""
        if name == "training.steps":
            note = f": the learning rate's cosine now ends at step {new}, from step {step} on it follows that curve"
        log0(f"{name} was {old!r}, is now {new!r}{note}")


def _check_workdir(workdir: Any) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir}: is a file; allowed: a run directory, or a path that is free")
    if workdir.is_dir() and any(workdir.iterdir()) and not (workdir / "config.yaml").is_file():
        raise ConfigError(
            f"{workdir}: holds files but no run (no config.yaml); allowed: a run directory, or a path that is free"
        )
