"""The training loop: prepare, restore, step, log, save."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from tqdm import tqdm

from mythos_jax.config import Config, ConfigError, ModelConfig, save_config
from mythos_jax.data.open import Batch, Data, open_data
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.model.mythos import Mythos, abstract_variables
from mythos_jax.runs import open_model, place
from mythos_jax.sharding import batch_sharding, check_batch, check_sharded, local_rows, make_mesh, to_global
from mythos_jax.training.checkpoint import Checkpoints
from mythos_jax.training.errors import BadStepError, Interrupted
from mythos_jax.training.metrics import Goodput, open_writers, plain
from mythos_jax.training.step import TrainState, evaluated, init_state, make_train_step
from mythos_jax.typed import differences, to_dict


def train(
    config: Config, workdir: str | Path, progress: bool = True, init_from: str | Path | None = None
) -> dict[str, Any]:
    """Trains until `training.steps`, from the run's newest checkpoint where there is one.

    Prepares the data first when it is missing. Writes config.yaml, metrics.jsonl and checkpoints/ into `workdir`.
    init_from: a run or a pretrained model whose weights a run without checkpoints starts from.
    Returns the metrics of the last step. Raises ConfigError (what the user can mend), BadStepError, SaveError,
    Interrupted.
    """
    workdir = Path(workdir)
    _check_workdir(workdir)
    mesh = make_mesh(config.mesh)
    check_sharded(mesh, abstract_variables(config.model))
    check_batch(mesh, config.training.batch_size, "training.batch_size")
    data = open_data(config, progress)

    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / "checkpoints", config.training.keep_checkpoints)
    with contextlib.closing(checkpoints):
        state = init_state(config, mesh)
        if (newest := checkpoints.newest()) is not None:
            _check_resume(config, data, checkpoints.meta(newest), workdir, newest)
            state = checkpoints.restore_newest(state)
            print(f"resuming {workdir} after step {int(state.step)}", file=sys.stderr)
        elif init_from is not None:
            state = state.replace(variables=_initial_variables(config, mesh, init_from))
        save_config(config, workdir / "config.yaml")
        return _Loop(config, mesh, data, checkpoints, workdir, progress).run(state)


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
        self.bar = tqdm(
            total=t.steps, initial=start, desc=f"train {self.config.name}", unit="step", disable=not self.progress
        )
        self.goodput, self.clock, self.tokens = Goodput(), time.perf_counter(), 0
        pending: tuple[int, dict[str, jax.Array]] | None = None
        with contextlib.ExitStack() as stack:
            writers = open_writers(t.writers, self.workdir, self.config.name, restored_step=start)
            self.writers = [stack.enter_context(contextlib.closing(writer)) for writer in writers]
            stack.enter_context(self.bar)
            stopped = stack.enter_context(_signals())
            profiler = stack.enter_context(_Profiler(t.profile_steps, self.workdir / "profile"))
            for step, batch in zip(range(start + 1, t.steps + 1), self._batches(start), strict=False):
                with profiler.step(step):
                    state, metrics = step_fn(state, batch)
                if pending:
                    self._read(*pending)
                pending = (step, metrics)
                saves = step % t.checkpoint_every == 0 or step == t.steps or stopped
                evaluates = t.evaluate_every and step % t.evaluate_every == 0
                if saves or evaluates:
                    # A state is saved only when the step that made it was sound.
                    self._read(*pending)
                    pending = None
                if evaluates:
                    self._write(step, {"held_out_loss": self._evaluate(state)})
                if saves:
                    self.checkpoints.save(state, self.meta)
                if stopped:
                    self.checkpoints.wait()
                    raise Interrupted(stopped[0], step)
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
        depths = [self.config.model.loops]
        variables = evaluated(state.variables, state.average)
        found = evaluate_depths(
            model, variables, self.held_out, depths, mesh=self.mesh, bytes_per_token=1, progress=False
        )
        return found[0].loss


class _Profiler:
    """A profiler trace of the steps from `first` to `last`, for TensorBoard or Perfetto; of none if `span` is ()."""

    def __init__(self, span: tuple[int, ...], folder: Path):
        self.span, self.folder, self.running = span, folder, False

    def __enter__(self):
        return self

    def __exit__(self, *_: Any) -> None:
        if self.running:
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        if self.span and self.span[0] <= step <= self.span[1] and not self.running:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self.running and step >= self.span[1]:
            self.__exit__()
            self.running = False


def _initial_variables(config: Config, mesh: Mesh, path: str | Path) -> dict[str, Any]:
    """The weights of another model, for this config's; fields that differ without changing a shape are announced."""
    opened = open_model(path)
    changed = differences(to_dict(opened.config.model), to_dict(config.model), "model")
    if _shapes(opened.config.model) != _shapes(config.model):
        fields = "; ".join(f"{name} is {old!r} there, {new!r} here" for name, (old, new) in changed.items())
        raise ConfigError(f"{path}: its weights do not fit this config ({fields})")
    for name, (old, new) in changed.items():
        print(f"{name} is {old!r} in {path}, {new!r} here", file=sys.stderr)
    return place(config.model, mesh, opened.variables)


def _shapes(model: ModelConfig) -> dict[str, Any]:
    return jax.tree.map(lambda x: x.shape, nn.unbox(abstract_variables(model)))


def run_meta(config: Config, data: Data) -> dict[str, Any]:
    """What a checkpoint remembers of its run; a resume under another model, batch, seed or data is refused."""
    return {
        "model": to_dict(config.model),
        "training": to_dict(config.training),
        "data": data.identity,
    }


# Fields whose change on resume would make the run neither the old one nor a new one.
_FIXED = ("training.batch_size", "training.seed", "training.optimizer", "training.ema_decay")


def _check_resume(config: Config, data: Data, saved: dict[str, Any], workdir: Path, step: int) -> None:
    now = run_meta(config, data)
    changed = differences({name: saved[name] for name in now}, now)
    refused = {k: v for k, v in changed.items() if k.startswith(("model.", "data")) or k in _FIXED}
    if refused:
        fields = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in refused.items())
        raise ConfigError(
            f"{workdir}: cannot resume, the run was made with other settings ({fields}); use a new --workdir"
        )
    for name, (old, new) in changed.items():
        note = ""
        if name == "training.steps":
            note = f": the learning rate's cosine now ends at step {new}, from step {step} on it follows that curve"
        print(f"{name} was {old!r}, is now {new!r}{note}", file=sys.stderr)


def _check_workdir(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir}: is a file; allowed: a run directory, or a path that is free")
    if workdir.is_dir() and any(workdir.iterdir()) and not (workdir / "config.yaml").is_file():
        raise ConfigError(
            f"{workdir}: holds files but no run (no config.yaml); allowed: a run directory, or a path that is free"
        )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM put their number into; the loop looks at it between steps. A second Ctrl-C acts
    at once."""
    caught: list[int] = []

    def note(number: int, _: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
