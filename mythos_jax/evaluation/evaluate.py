"""`mythos eval`: a model on held-out rows or on the examples of its task."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_jax.config import ConfigError
from mythos_jax.data.fetch import local_folder
from mythos_jax.data.manifest import Split, load_manifest
from mythos_jax.data.pipeline import eval_batches
from mythos_jax.data.tasks import TaskData
from mythos_jax.evaluation.depths import DepthResult, default_depths, evaluate_depths
from mythos_jax.evaluation.exact_match import TaskResult, evaluate_task, format_task_table
from mythos_jax.flops import count_parameters
from mythos_jax.model.halting import Halting, check_halting
from mythos_jax.runs import Opened
from mythos_jax.sharding import check_batch


def evaluate_model(
    opened: Opened,
    *,
    data: str | None = None,
    loops: Sequence[int] | None = None,
    halting: Halting | None = None,
    progress: bool = True,
) -> tuple[list[DepthResult] | list[TaskResult], dict[str, Any]]:
    """A model on the held-out rows of `data` (a run: by default its own, of all parts of its mixture, or the examples
    of its task); also what the report says about it. `evaluation.max_rows` counts per part.

    Raises ConfigError: no data, rows of another tokenizer, a policy that the model cannot follow.
    """
    config, mesh = opened.config, opened.mesh
    if data is None and opened.step is None:
        raise ConfigError(f"{opened.directory}: a pretrained model has no data of its own; allowed: --data DIR")
    check_halting(config.model, halting, cached=False)
    check_batch(mesh, config.evaluation.batch_size, "evaluation.batch_size")
    depths = loops or config.evaluation.loops or default_depths(config.model.loops)
    about = {
        "name": config.name,
        "step": opened.step,
        "loops": config.model.loops,
        "parameters": count_parameters(config.model),
        "halting": halting and halting.criterion,
    }
    if config.data.task.name and data is None:
        size, most = config.evaluation.batch_size, config.evaluation.max_rows
        task = TaskData(config)
        examples = {d: list(task.eval_batches(d, batch_size=size, max_rows=most)) for d in task.difficulties}
        task_results = evaluate_task(
            opened.model, opened.variables, examples, depths, mesh=mesh, halting=halting, progress=progress
        )
        return task_results, about | {"task": config.data.task.name, "trained_on": list(config.data.task.difficulty)}
    named = [data] if data else list(config.data.mixture) or [config.data_path]
    folders = [local_folder(folder) for folder in named]
    kept = [_held_out(opened, folder) for folder in folders]
    size, most = config.evaluation.batch_size, config.evaluation.max_rows
    batches = [
        batch
        for folder, split in zip(folders, kept, strict=True)
        if split.rows or len(folders) == 1  # a part of a mixture may have nothing held out
        for batch in eval_batches(folder, batch_size=size, max_rows=most, document_mask=config.data.document_mask)
    ]
    if not batches:
        raise ConfigError(f"{', '.join(named)}: no rows are held out to evaluate on")
    results = evaluate_depths(
        opened.model,
        opened.variables,
        batches,
        depths,
        mesh=mesh,
        bytes_per_token=sum(split.text_bytes for split in kept) / sum(split.tokens for split in kept),
        halting=halting,
        progress=progress,
    )
    return results, about


def _held_out(opened: Opened, folder: Path) -> Split:
    """What is held out in a prepared folder. Raises ConfigError where it is not for this model."""
    manifest, model = load_manifest(folder), opened.config.model
    if opened.tokenizer_spec and manifest.tokenizer_fingerprint != opened.tokenizer().fingerprint:
        raise ConfigError(f"{folder}: prepared with another tokenizer than the model's, {manifest.tokenizer}")
    for name, needed, has in [
        ("vocab_size", manifest.vocab_size, model.vocab_size),
        ("seq_len", manifest.seq_len, model.max_seq_len),
    ]:
        if needed > has:
            raise ConfigError(f"{folder}: {name} is {needed}, allowed: at most the model's, {has}")
    return manifest.splits["held_out"]


def format_table(results: Sequence[DepthResult] | Sequence[TaskResult]) -> str:
    if isinstance(results[0], TaskResult):
        return format_task_table(results)
    lines = [f"{'loops':>6} {'nats/token':>11} {'bits/byte':>10} {'mean loops':>11}"]
    lines += [f"{r.loops:>6} {r.loss:>11.4f} {r.bits_per_byte:>10.4f} {r.mean_loops:>11.2f}" for r in results]
    return "\n".join(lines)


def as_json(results: Sequence[DepthResult] | Sequence[TaskResult]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]
