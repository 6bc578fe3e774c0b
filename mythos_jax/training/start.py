"""How a run starts: what can be refused is refused before the first step, in the order of what it costs to know."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from mythos_jax.config import Config
from mythos_jax.data.manifest import MANIFEST_FILE
from mythos_jax.data.open import Data, open_data
from mythos_jax.data.placement import check_batch, fitting_batch
from mythos_jax.errors import ConfigError
from mythos_jax.flops import low_rank_sizes
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.low_rank import target_paths
from mythos_jax.paths import to_path
from mythos_jax.processes import is_process_zero, log0, process_zero_first, raise_together
from mythos_jax.runs.base import ModelRecord, announce_step, naming
from mythos_jax.runs.checkpoints import Checkpoints, newest_folder, newest_meta
from mythos_jax.runs.comparison import compared
from mythos_jax.runs.configs import has_begun, model_of
from mythos_jax.runs.load import load_base, load_model
from mythos_jax.runs.local_checkpoints import TOKEN_FILE, LocalCheckpoints
from mythos_jax.runs.lock import RunLock, locked
from mythos_jax.runs.low_rank import abstract_base
from mythos_jax.runs.owner import LOCK_FILE
from mythos_jax.runs.records import CONFIG_FILE, METRICS_FILE, read_log
from mythos_jax.runs.state import Constants, TrainState
from mythos_jax.sharding import check_sharded, make_mesh
from mythos_jax.training.groups import rate_factors
from mythos_jax.training.loggers import check_loggers
from mythos_jax.training.resume import Metadata, announce_changes, check_resume, checkpoint_metadata
from mythos_jax.training.step import abstract_state, init_state
from mythos_jax.training.teacher import abstract_teacher, load_teacher
from mythos_jax.training.tokenizers import check_tokenizers, with_local_tokenizer
from mythos_jax.training.watchdog import Watchdog
from mythos_jax.typed import check_field


def check_config(config: Config) -> Mesh:
    """The mesh of a run. Raises ConfigError for whatever the config and this machine alone show to be wrong."""
    check_loggers(config.training.loggers)
    mesh = make_mesh(config.mesh)
    check_on_mesh(config, mesh)
    return mesh


def check_on_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for whatever the config and the mesh alone show to be wrong, attached or not."""
    t = config.training
    rate_factors(config)  # checks the names of parameters, frozen ones and those with low-rank weights included
    needs_base = t.lora.rank > 0 and not t.init_from
    check_field(not needs_base, "training.init_from", t.init_from, "a model, whose weights training.lora leaves as is")
    if problem := t.schedule_problem():
        log0(f"warning: {problem}", logging.WARNING)
    span = t.profile_steps
    check_field(
        not span or span[0] <= t.steps, "training.profile_steps", span, f"steps up to training.steps, {t.steps}"
    )
    check_sharded(mesh, abstract_variables(config.model))
    check_batch(mesh, t.batch_size, "training.batch_size")
    part = t.batch_size // t.grad_accumulation_steps
    if fitting_batch(mesh, part) != part:
        log0(
            f"warning: training.grad_accumulation_steps: parts have {part} rows; devices repeat work unless "
            f"it is a multiple of {fitting_batch(mesh, 1)}",
            logging.WARNING,
        )
    if t.evaluate_every:
        data = config.data
        held_out = data.held_out_fraction > 0 or not data.sources or data.task.name != ""
        check_field(held_out, "training.evaluate_every", t.evaluate_every, "0 with data.held_out_fraction 0")


@contextlib.contextmanager
def hold_run_dir(run_dir: Any) -> Iterator[RunLock | None]:
    """Makes the run directory, and keeps it from other runs of `train`. Process 0 does it for all processes of a run
    and gets the lock; the others get None.

    Raises ConfigError: it cannot be written, or holds something else. LockError: it is in use.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> RunLock | None:
            if is_process_zero():
                _check_run_dir(run_dir)
                return stack.enter_context(locked(run_dir))
            if not run_dir.is_dir():
                raise ConfigError(
                    f"{run_dir}: process {jax.process_index()} cannot see the directory that process 0 made; allowed: "
                    "a --workdir that all processes share"
                )
            return None

        yield process_zero_first(str(run_dir), hold)


def _check_run_dir(run_dir: Any) -> None:
    """Raises ConfigError rather than write a run among someone else's files."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: is a file; allowed: a run directory, or a path that does not exist")
    if not run_dir.is_dir() or (run_dir / CONFIG_FILE).is_file():
        return
    if any(not _is_left_over(path) for path in run_dir.iterdir()):
        raise ConfigError(
            f"{run_dir}: contains files but no run (no config.yaml); allowed: a run directory, or a path that does not "
            "exist"
        )


def _is_left_over(path: Any) -> bool:
    """Whether this is what a run leaves that is killed before it has written its config."""
    if path.name == "checkpoints" and path.is_dir():
        return not any(path.iterdir())
    return path.name == LOCK_FILE or path.name.startswith((".config.yaml.", f".{LOCK_FILE}."))


def load_initial(config: Config, run_dir: Any) -> dict[str, Any] | None:
    """The weights of `training.init_from` on the run's mesh; None without it, and for a run that has checkpoints of its
    own.

    The other model must have the same shapes, but for an exit gate, which a model can be given; other fields that
    differ are announced.
    """
    path = config.training.init_from
    if not path or config.training.lora.rank or has_begun(run_dir):
        return None
    # Shapes first: no weights are read to know them.
    theirs = model_of(path)
    gate_is_new = config.model.exit_gate and not theirs.exit_gate and theirs.readout != "act"
    if gate_is_new:
        theirs = replace(theirs, exit_gate=True)
    changed = compared(theirs, config.model, path)
    loaded = load_model(path, mesh=config.mesh, keep_int8=False, with_predictor=False, merge=True)
    check_tokenizers(config, loaded, path, "the run starts from its weights")
    _announce_differences(changed, path)
    if gate_is_new:
        log0(f"{path}: has no exit gate; the run starts with a new one")
    return loaded.variables


def _announce_differences(changed: dict[str, tuple[Any, Any]], path: str) -> None:
    for name, (old, new) in changed.items():
        log0(f"{name} is {old!r} in {path}, {new!r} in this run")


def load_constants(config: Config, mesh: Mesh, run_dir: Any) -> tuple[Constants, dict[str, ModelRecord | None]]:
    """What the steps of a run only read: of a LoRA run the weights of `training.init_from`, also when it goes on, and
    the teacher. Also the records of both models. Raises ConfigError, which names the field, if one is not there."""
    constants = Constants()
    records: dict[str, ModelRecord | None] = {"base": None, "teacher": None}
    if not config.training.lora.rank and not config.training.distillation.teacher:
        return constants, records
    saved = newest_meta(run_dir / "checkpoints")  # on all processes at once: Orbax waits for all of them
    if config.training.lora.rank:
        base, records["base"] = _load_base(config, mesh, saved.get("base"), run_dir)
        constants = constants.replace(base=base)
    if config.training.distillation.teacher:
        with naming("training.distillation.teacher"):
            teacher, records["teacher"] = load_teacher(config, saved.get("teacher"), run_dir)
        constants = constants.replace(teacher=teacher)
    if not saved:
        for record in records.values():
            announce_step(record)
    return constants, records


def abstract_constants(config: Config, mesh: Mesh) -> Constants:
    """The shapes, dtypes and places of what `load_constants` loads, for compiling ahead of time."""
    base = abstract_base(config, mesh) if config.training.lora.rank else None
    return Constants(base=base, teacher=abstract_teacher(config, mesh))


def _load_base(
    config: Config, mesh: Mesh, saved: ModelRecord | None, run_dir: Any
) -> tuple[dict[str, Any], ModelRecord]:
    lora, path = config.training.lora, config.training.init_from
    paths = target_paths(config.model, lora)  # checks them before weights are read
    with naming("training.init_from", "--init-from"):
        loaded, record, changed = load_base(config, mesh, saved, run_dir)
    if saved is None:
        check_tokenizers(config, loaded, path, "the run starts from its weights")
        _announce_differences(changed, path)
        count = sum(low_rank_sizes(config).values())
        log0(f"{count:,} low-rank weights of rank {lora.rank} are trained, beside {len(paths)} matrices of {path}")
        if config.model.feed_forward == "moe":
            log0("the routed experts have no low-rank weights")
    return loaded.variables, record


def finished_step(config: Config, mesh: Mesh, run_dir: Any, watchdog: Watchdog) -> int | None:
    """The last step of a run that is finished; None for any other. It needs neither its base nor its teacher any more,
    and data that is gone is not prepared again. watchdog: rests while data is opened.

    Raises ConfigError if the run was made with other settings or data.
    """
    folder = f"{run_dir}/checkpoints"
    newest = process_zero_first(folder, lambda: newest_folder(run_dir / "checkpoints"), identity=str)
    if newest is None or newest < config.training.steps:
        return None
    if process_zero_first("data", lambda: _data_is_gone(config), identity=str):
        return newest
    with watchdog.resting():
        data = open_run_data(config, run_dir, progress=False)
    metadata = checkpoint_metadata(config, data)
    with open_checkpoints(config, run_dir) as checkpoints:
        step = int(_restored(config, mesh, metadata, checkpoints, run_dir)[0].step)
    return step if step >= config.training.steps else None  # the newest checkpoint may be damaged


def _data_is_gone(config: Config) -> bool:
    if config.data.task.name:
        return False
    folders = list(config.data.mixture) or [config.data_path]
    return not all((to_path(folder) / MANIFEST_FILE).exists() for folder in folders)


@contextlib.contextmanager
def open_checkpoints(config: Config, run_dir: Any) -> Iterator[Checkpoints]:
    """The checkpoints of a run. Raises ConfigError if its processes do not see the same ones: they would restore
    different steps."""
    with contextlib.closing(Checkpoints(run_dir / "checkpoints", config.training.keep_checkpoints)) as checkpoints:
        process_zero_first(f"{run_dir}/checkpoints", checkpoints.steps, identity=str)
        yield checkpoints


@contextlib.contextmanager
def open_local_checkpoints(config: Config, run_dir: Any) -> Iterator[LocalCheckpoints | None]:
    """Those of `training.local_checkpoints`, on all processes; None if it is off."""
    folder = config.training.local_checkpoints.folder
    if not folder:
        # The run goes on without them, so that those of an earlier start are not its future.
        raise_together(lambda: (run_dir / TOKEN_FILE).unlink(missing_ok=True) if is_process_zero() else None)
        yield None
        return
    with contextlib.closing(LocalCheckpoints(folder, run_dir)) as local:
        yield local


def open_run_data(config: Config, run_dir: Any, progress: bool) -> Data:
    """The data of all processes, which process 0 prepares if it is missing.

    Raises ConfigError: there is no such data, its text has changed before the run has begun, or nothing is held out for
    `training.evaluate_every`.
    """
    local = with_local_tokenizer(config)

    def open_here() -> Data:
        first = is_process_zero()
        data = open_data(local, progress and first, prepare=first, resumes=has_begun(run_dir))
        if every := config.training.evaluate_every:
            _check_held_out(config, data, every)
        return data

    return process_zero_first("data", open_here, identity=lambda data: str(data.identity))


def _check_held_out(config: Config, data: Data, every: int) -> None:
    settings = config.evaluation
    try:
        batch = next(iter(data.held_out_batches(settings.batch_size, settings.max_rows)), None)
        problem = "" if batch is not None else "no rows are held out"
    except ConfigError as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"training.evaluate_every: got {every}, allowed: 0, because of the data ({problem})")


def starting_state(
    config: Config,
    mesh: Mesh,
    metadata: Metadata,
    checkpoints: Checkpoints,
    local: LocalCheckpoints | None,
    run_dir: Any,
    initial: dict[str, Any] | None,
) -> TrainState:
    """The newest checkpoint, local ones included, else the weights `initial`, else weights drawn from the seed.
    metadata: those that the run's checkpoints will have."""
    found = None
    if local is not None:
        like = abstract_state(config, mesh)
        check = partial(check_resume, current=metadata, workdir=run_dir)
        found = local.restore(like, check, checkpoints.newest(), config.training.steps)
    if found is None and checkpoints.newest() is None:
        state = init_state(config, mesh)
        if initial is not None:
            variables = _overlaid(state.variables, initial)
            # A copy: the step is given the state's memory to write into, which it cannot be twice.
            average = None if state.average is None else jax.tree.map(jnp.copy, variables["params"])
            state = state.replace(variables=variables, average=average)
        checkpoints.check_space(state)
        return state
    state, saved = found or _restored(config, mesh, metadata, checkpoints, run_dir)
    announce_changes(saved, metadata, int(state.step))
    log0(f"resuming {run_dir} after step {int(state.step)}" + (", from local checkpoints" if found else ""))
    checkpoints.check_space(state)
    return state


def _restored(
    config: Config, mesh: Mesh, metadata: Metadata, checkpoints: Checkpoints, run_dir: Any
) -> tuple[TrainState, Metadata]:
    """The newest checkpoint. Raises ConfigError if the run was made with other settings or data."""
    like = abstract_state(config, mesh)  # tells where each restored array belongs on this mesh
    return checkpoints.restore_newest(like, lambda saved: check_resume(saved, metadata, run_dir))


def _overlaid(fresh: Any, initial: Any) -> Any:
    """The weights `initial`, with fresh ones where it has none."""
    if not isinstance(fresh, dict):
        return initial
    return {name: _overlaid(fresh[name], initial[name]) if name in initial else fresh[name] for name in fresh}


def finished(config: Config, run_dir: Any, step: int) -> dict[str, Any]:
    """The last metrics of a run that has no steps left, as far as its log has them; says that nothing is trained."""
    steps = config.training.steps
    past = f", which is past training.steps, {steps}" if step > steps else ""
    log0(f"{run_dir}: is trained to step {step} already{past}; nothing is left to do")
    log = run_dir / METRICS_FILE
    records = read_log(log)[0] if is_process_zero() and log.exists() else []
    ends = (record for record, _ in reversed(records) if record["step"] == step and "loss" in record)
    return next(ends, {"step": step})
