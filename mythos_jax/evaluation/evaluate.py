"""`mythos eval`: evaluates a model on held-out text, problems of its task, or tasks of lm-evaluation-harness."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mythos_jax.data.batch import Batch
from mythos_jax.data.fetch import local_folder
from mythos_jax.data.manifest import Manifest, load_manifest
from mythos_jax.data.pipeline import eval_batches
from mythos_jax.data.tasks import TaskData
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.exact_match import evaluate_problems
from mythos_jax.evaluation.loop_trace import trace_loops
from mythos_jax.evaluation.policies import Setting, default_depths, make_settings
from mythos_jax.evaluation.results import Evaluation, HarnessTasks, HeldOutText, LoopTrace, ModelInfo, ReasoningTask
from mythos_jax.evaluation.text_bytes import measured_bytes
from mythos_jax.flops import count_parameters
from mythos_jax.model.halting import Halting
from mythos_jax.model.predictor import check_predictor
from mythos_jax.processes import log0
from mythos_jax.runs.load import LoadedModel


def evaluate_model(
    loaded: LoadedModel,
    *,
    data: str | None = None,
    loops: Sequence[int] | None = None,
    halting: Sequence[Halting] = (),
    expected: bool = False,
    with_loop_trace: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Evaluates a model at each depth of `loops` and under each policy of `halting`.

    data: a prepared folder, whose held-out rows are used. Default: those of the run (of all parts of a mixture) or,
    for a run on a reasoning task, held-out problems. `evaluation.max_rows` is the limit per part or difficulty.
    expected: also the exit gate's expected logits at each depth. with_loop_trace: also measures what each loop does.

    Raises ConfigError: no data, rows of another tokenizer, a policy that the model cannot follow, no exit gate.
    """
    if data is None and loaded.step is None:
        allowed = "--data DIR (made by mythos data), or --tasks"
        raise ConfigError(f"{loaded.directory}: a pretrained model has no data of its own; allowed: {allowed}")
    settings = choose_settings(loaded, loops, halting, expected)
    _announce_batch(loaded)
    if loaded.config.data.task.name and data is None:
        return _evaluate_on_problems(loaded, settings, with_loop_trace, progress)
    return _evaluate_on_text(loaded, data, settings, with_loop_trace, progress)


def _evaluate_on_problems(
    loaded: LoadedModel, settings: Sequence[Setting], with_loop_trace: bool, progress: bool
) -> Evaluation:
    config, task = loaded.config, TaskData(loaded.data_config)
    size, max_rows = loaded.evaluation_batch, config.evaluation.max_rows
    batches = {d: list(task.eval_batches(d, batch_size=size, max_rows=max_rows)) for d in task.difficulties}
    measurements, usage = evaluate_problems(
        loaded.model, loaded.variables, batches, settings, mesh=loaded.mesh, progress=progress
    )
    return Evaluation(
        describe_model(loaded),
        ReasoningTask(config.data.task.name, list(config.data.task.difficulty)),
        measurements,
        usage,
        _trace(loaded, batches[task.difficulties[-1]][0], settings) if with_loop_trace else None,
        decode=task.text,
    )


def _evaluate_on_text(
    loaded: LoadedModel, data: str | None, settings: Sequence[Setting], with_loop_trace: bool, progress: bool
) -> Evaluation:
    batches, bytes_per_token = held_out_batches(loaded, data)
    measurements, usage = evaluate_depths(
        loaded.model,
        loaded.variables,
        batches,
        settings,
        mesh=loaded.mesh,
        bytes_per_token=bytes_per_token,
        progress=progress,
    )
    config = loaded.config
    return Evaluation(
        describe_model(loaded),
        HeldOutText(data or list(config.data.mixture) or config.data_path, row_tokens=batches[0]["targets"].shape[1]),
        measurements,
        usage,
        _trace(loaded, batches[0], settings) if with_loop_trace else None,
        decode=loaded.tokenizer.decode if loaded.tokenizer else str,
    )


def _trace(loaded: LoadedModel, batch: dict[str, np.ndarray], settings: Sequence[Setting]) -> LoopTrace:
    deepest = max(setting.loops for setting in settings)
    return trace_loops(loaded.model, loaded.variables, batch, deepest, mesh=loaded.mesh)


def evaluate_on_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    loops: Sequence[int] | None = None,
    halting: Sequence[Halting] = (),
    include_path: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluates a model on tasks of lm-evaluation-harness, by default at its own depth.

    The arguments from `include_path` on are those of `lm_eval.run_harness`. A task that fails while it runs is one of
    the `failures` of the result, next to the numbers of the others.

    Raises ConfigError: the harness is not installed, a task that is unknown or wrong, a model without a tokenizer.
    """
    try:
        from mythos_jax.evaluation.lm_eval import run_harness  # an extra that not every installation has
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError("--tasks: needs lm-evaluation-harness; pip install '.[lm-eval]' in the checkout") from None
    settings = choose_settings(loaded, loops or [loaded.config.model.loops], halting)
    _announce_batch(loaded)
    measurements, failures = run_harness(
        loaded,
        tasks,
        settings,
        include_path=include_path,
        limit=limit,
        seed=seed,
        progress=progress,
    )
    data = HarnessTasks(list(tasks), limit, seed)
    return Evaluation(describe_model(loaded), data, measurements, failures=failures)


def _announce_batch(loaded: LoadedModel) -> None:
    wanted, used = loaded.config.evaluation.batch_size, loaded.evaluation_batch
    if used != wanted:
        log0(f"evaluation.batch_size: {wanted} does not divide over the devices, using {used}")


def choose_settings(
    loaded: LoadedModel, loops: Sequence[int] | None, halting: Sequence[Halting], expected: bool = False
) -> list[Setting]:
    """The requested settings. Depths default to `evaluation.loops` of the config, else to `default_depths`."""
    for policy in halting:
        check_predictor(policy, loaded.variables)
    depths = loops or loaded.config.evaluation.loops or default_depths(loaded.config.model.loops)
    return make_settings(loaded.config.model, depths, halting, expected)


def describe_model(loaded: LoadedModel) -> ModelInfo:
    return ModelInfo(
        name=loaded.config.name,
        step=loaded.step,
        seed=None if loaded.step is None else loaded.config.training.seed,
        loops=loaded.config.model.loops,
        parameters=count_parameters(loaded.config.model),
        weights=str(loaded.storage),
    )


def held_out_batches(loaded: LoadedModel, data: str | None) -> tuple[list[Batch], float]:
    """Batches of the held-out rows in `data` (default: all parts of the run's own), and the bytes of text per target.

    Raises ConfigError: no held-out rows, or rows that the model cannot read.
    """
    config = loaded.config
    names = [data] if data else list(config.data.mixture) or [config.data_path]
    seq_len = None if data else config.data.seq_len
    folders = [local_folder(data)] if data else loaded.own_folders()
    manifests = {folder: _readable(loaded, folder, seq_len) for folder in folders}
    batches: list[Batch] = []
    text_bytes, weighted = 0, any(manifest.chat is not None for manifest in manifests.values())
    for folder, manifest in manifests.items():
        if not manifest.splits["held_out"].rows:
            continue  # a part of a mixture may have none
        part = list(
            eval_batches(
                folder,
                batch_size=loaded.evaluation_batch,
                max_rows=config.evaluation.max_rows,
                document_mask=config.data.document_mask,
                weighted=weighted,
            )
        )
        batches += part
        text_bytes += measured_bytes(part, folder, manifest, loaded.tokenizer)
    if not batches:
        raise ConfigError(f"{', '.join(names)}: no held-out rows to evaluate on")
    return batches, text_bytes / sum(np.count_nonzero(batch["mask"]) for batch in batches)


def _readable(loaded: LoadedModel, folder: Path, seq_len: int | None) -> Manifest:
    """The manifest of a prepared folder. Raises ConfigError if this model cannot read its rows.

    seq_len: as for `TrainedOn.check_rows`.
    """
    manifest, model = load_manifest(folder), loaded.config.model
    loaded.trained_on.check_rows(manifest, folder, seq_len)
    if loaded.tokenizer and manifest.tokenizer_fingerprint != loaded.tokenizer.fingerprint:
        raise ConfigError(f"{folder}: prepared with a different tokenizer from the model's: {manifest.tokenizer}")
    for name, value, limit in [
        ("vocab_size", manifest.vocab_size, model.vocab_size),
        ("seq_len", manifest.seq_len, model.max_seq_len),
    ]:
        if value > limit:
            raise ConfigError(f"{folder}: {name} is {value}, allowed: at most the model's, {limit}")
    return manifest
