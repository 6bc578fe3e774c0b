"""The report of an evaluation: evaluation.json with the numbers, and index.html with charts of them."""

import json
import math
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from mythos_jax.evaluation.results import Evaluation, HarnessTasks, HeldOutText, ReasoningTask
from mythos_jax.paths import to_path, write_whole
from mythos_jax.report.html import document, section
from mythos_jax.report.loop_use import convergence_section, experts_section, hardness_section, heat_map_section
from mythos_jax.report.pareto import make_panels
from mythos_jax.report.quality import depth_section, halting_section


def write_report(folder: str | Path, evaluation: Evaluation, command: str) -> tuple[Path, Path]:
    """Writes evaluation.json and index.html and returns their paths. command: what made the report, for display."""
    directory = to_path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    numbers, page = directory / "evaluation.json", directory / "index.html"
    write_whole(numbers, (json.dumps(evaluation.to_json(), indent=2, allow_nan=False) + "\n").encode())
    write_whole(page, render_page(evaluation, command).encode())
    return numbers, page


def render_page(evaluation: Evaluation, command: str) -> str:
    """The HTML document. Sections that the evaluation has nothing for are left out."""
    panels = make_panels(evaluation)
    sections = [*_warnings(evaluation), depth_section(evaluation, panels)]
    if not all(m.setting.is_fixed_depth for m in evaluation.results):
        sections.append(halting_section(evaluation, panels))
    if evaluation.loop_usage:
        sections += [heat_map_section(evaluation), hardness_section(evaluation)]
    if evaluation.loop_trace is not None:
        sections.append(convergence_section(evaluation.loop_trace))
        if evaluation.loop_trace.expert_share_LGE is not None:
            sections.append(experts_section(evaluation.loop_trace.expert_share_LGE))
    return document(
        f"{evaluation.model.name}: what depth buys",
        _facts(evaluation),
        command,
        sections,
        f"Made by mythos_jax on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; the same numbers are in evaluation.json.",
    )


def _warnings(evaluation: Evaluation) -> list[str]:
    """Sections about what went wrong; mostly none."""
    sections = []
    # The harness has no loss: there NaN is what is expected.
    values = [[m.value] if isinstance(evaluation.data, HarnessTasks) else [m.value, m.loss] for m in evaluation.results]
    count = sum(not all(map(math.isfinite, of_one)) for of_one in values)
    if count:
        words = (
            f"{count} of {len(values)} measurements are NaN or infinite: with these settings the model gives no usable "
            "probabilities. Tables show them as they are, charts leave them out, and in evaluation.json they are null."
        )
        sections.append(section("Not a number", words))
    if evaluation.failures:
        items = "".join(f"<li>{escape(line)}</li>" for line in evaluation.failures)
        sections.append(section("Tasks that failed", "Their numbers are missing.", f"<ul>{items}</ul>"))
    return sections


def _facts(evaluation: Evaluation) -> list[str]:
    """What was evaluated, on what."""
    model = evaluation.model
    stored = "" if model.weights == "float32" else f" as {model.weights}"
    depth = f"trained with {model.loops} loop{'' if model.loops == 1 else 's'}"
    facts = [f"{model.parameters:,} parameters{stored}", depth]
    if model.step is not None:
        facts += [f"step {model.step:,}", f"seed {model.seed}"]
    match evaluation.data:
        case HeldOutText(data=data):
            folders = data if isinstance(data, str) else ", ".join(data)
            facts.append(f"{evaluation.results[0].n:,} tokens of held-out text from {folders}")
        case ReasoningTask(task=task, trained_on=difficulties):
            facts.append(f"task {task}, trained on difficulty {', '.join(map(str, difficulties))}")
        case HarnessTasks(tasks=tasks, task_seed=seed):
            facts.append(f"tasks {', '.join(tasks)}, {'default seeds' if seed is None else f'seed {seed}'}")
    return facts
