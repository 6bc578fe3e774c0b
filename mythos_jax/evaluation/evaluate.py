"""`mythos eval`: a model on held-out rows, on the examples of its task, or on tasks of lm-evaluation-harness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos_jax.data.fetch import local_folder
from mythos_jax.data.manifest import Split, load_manifest
from mythos_jax.data.pipeline import eval_batches
from mythos_jax.data.placement import check_batch
from mythos_jax.data.tasks import TaskData
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.exact_match import evaluate_task
from mythos_jax.evaluation.loop_trace import trace_loops
from mythos_jax.evaluation.policies import Setting, default_depths, settings
from mythos_jax.evaluation.results import Evaluation
from mythos_jax.flops import count_parameters
from mythos_jax.model.halting import Halting
from mythos_jax.runs.load import LoadedModel


def evaluate_model(
    loaded: LoadedModel,
    *,
    data: str | None = None,
    loops: Sequence[int] | None = None,
    halting: Sequence[Halting] = (),
    look_inside: bool = False,
    progress: bool = True,
) -> Evaluation:
    """A model on the held-out rows of `data` (a run: by default its own, of all parts of its mixture, or the examples
    of its task). `evaluation.max_rows` counts per part. look_inside: also what happens loop by loop.

    Raises ConfigError: no data, rows of another tokenizer, a policy that the model cannot follow.
    """
    config, mesh = loaded.config, loaded.mesh
    if data is None and loaded.step is None:
        raise ConfigError(f"{loaded.directory}: a pretrained model has no data of its own; allowed: --data DIR")
    chosen = chosen_settings(loaded, loops, halting)
    check_batch(mesh, config.evaluation.batch_size, "evaluation.batch_size")
    about = describe_model(loaded)
    size, most = config.evaluation.batch_size, config.evaluation.max_rows
    common = {"mesh": mesh, "progress": progress}

    if config.data.task.name and data is None:
        task = TaskData(config)
        examples = {d: list(task.eval_batches(d, batch_size=size, max_rows=most)) for d in task.difficulties}
        results, traces = evaluate_task(loaded.model, loaded.variables, examples, chosen, **common)
        about |= {"task": config.data.task.name, "trained_on": list(config.data.task.difficulty)}
        symbols = task.problem.symbols
        sample, says = examples[task.difficulties[-1]][0], lambda tokens: " ".join(symbols[i] for i in tokens)
    else:
        batches, bytes_per_token = held_out_rows(loaded, data)
        results, traces = evaluate_depths(
            loaded.model, loaded.variables, batches, chosen, bytes_per_token=bytes_per_token, **common
        )
        about |= {"data": data or (list(config.data.mixture) or config.data_path)}
        sample, says = batches[0], str
        if loaded.tokenizer_spec:
            says = loaded.tokenizer().decode
    inside = None
    if look_inside:
        inside = trace_loops(loaded.model, loaded.variables, sample, max(s.loops for s in chosen), mesh=mesh)
    return Evaluation(results, about, traces, inside, says)


def evaluate_on_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    loops: Sequence[int] | None = None,
    halting: Sequence[Halting] = (),
    include_path: str | None = None,
    tokenizer: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """A model on tasks of lm-evaluation-harness (`harness.evaluate_tasks`), by default at its own depth.

    Raises ConfigError: the harness is not installed, no such task, a model without a tokenizer.
    """
    try:
        from mythos_jax.evaluation.lm_eval import evaluate_tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError("--tasks: needs lm-evaluation-harness; pip install 'mythos-jax[lm-eval]'") from None
    check_batch(loaded.mesh, loaded.config.evaluation.batch_size, "evaluation.batch_size")
    chosen = chosen_settings(loaded, loops or [loaded.config.model.loops], halting)
    results = evaluate_tasks(
        loaded,
        tasks,
        chosen,
        include_path=include_path,
        tokenizer=tokenizer,
        limit=limit,
        seed=seed,
        progress=progress,
    )
    return Evaluation(results, describe_model(loaded) | {"tasks": list(tasks), "limit": limit, "task_seed": seed})


def chosen_settings(loaded: LoadedModel, loops: Sequence[int] | None, halting: Sequence[Halting]) -> list[Setting]:
    """Those asked for; depths by default the config's, else `default_depths`."""
    depths = loops or loaded.config.evaluation.loops or default_depths(loaded.config.model.loops)
    return settings(loaded.config.model, depths, halting)


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """What a report says of a model."""
    return {
        "name": loaded.config.name,
        "step": loaded.step,
        "seed": None if loaded.step is None else loaded.config.training.seed,
        "loops": loaded.config.model.loops,
        "parameters": count_parameters(loaded.config.model),
    }


def held_out_rows(loaded: LoadedModel, data: str | None) -> tuple[list[dict[str, Any]], float]:
    """Batches of what is held out in `data` (default: all parts of the run's own), and its text's bytes per token."""
    config = loaded.config
    named = [data] if data else list(config.data.mixture) or [config.data_path]
    folders = [local_folder(folder) for folder in named]
    kept = [_held_out(loaded, folder) for folder in folders]
    size, most = config.evaluation.batch_size, config.evaluation.max_rows
    batches = [
        batch
        for folder, split in zip(folders, kept, strict=True)
        if split.rows or len(folders) == 1  # a part of a mixture may have nothing held out
        for batch in eval_batches(folder, batch_size=size, max_rows=most, document_mask=config.data.document_mask)
    ]
    if not batches:
        raise ConfigError(f"{', '.join(named)}: no rows are held out to evaluate on")
    return batches, sum(split.text_bytes for split in kept) / sum(split.tokens for split in kept)


def _held_out(loaded: LoadedModel, folder: Path) -> Split:
    """What is held out in a prepared folder. Raises ConfigError where it is not for this model."""
    manifest, model = load_manifest(folder), loaded.config.model
    if loaded.tokenizer_spec and manifest.tokenizer_fingerprint != loaded.tokenizer().fingerprint:
        raise ConfigError(f"{folder}: prepared with another tokenizer than the model's, {manifest.tokenizer}")
    for name, needed, has in [
        ("vocab_size", manifest.vocab_size, model.vocab_size),
        ("seq_len", manifest.seq_len, model.max_seq_len),
    ]:
        if needed > has:
            raise ConfigError(f"{folder}: {name} is {needed}, allowed: at most the model's, {has}")
    return manifest.splits["held_out"]
