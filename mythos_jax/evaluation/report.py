"""What an evaluation leaves behind: the numbers and a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos_jax.evaluation.depths import DepthResult
from mythos_jax.evaluation.evaluate import as_json
from mythos_jax.evaluation.exact_match import TaskResult
from mythos_jax.paths import to_path


def write_report(
    folder: str | Path, results: Sequence[DepthResult] | Sequence[TaskResult], about: dict[str, Any]
) -> tuple[Path, Path]:
    """Writes evaluation.json and a picture, loss_by_loops.png or exact_match_by_loops.png; returns their paths.

    about: name, step (or None), loops (the trained depth), parameters, halting (text or None); of a task also its
    name and the difficulties trained on, `task` and `trained_on`.
    """
    folder = to_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    of_task = isinstance(results[0], TaskResult)
    numbers = folder / "evaluation.json"
    picture = folder / ("exact_match_by_loops.png" if of_task else "loss_by_loops.png")
    numbers.write_text(json.dumps({**about, "results": as_json(results)}, indent=2) + "\n")
    _plot(picture, _draw_exact_match if of_task else _draw_loss, results, about)
    return numbers, picture


def _plot(path: Path, draw: Any, results: Sequence[Any], about: dict[str, Any]) -> None:
    from matplotlib.figure import Figure  # here, so that nothing else waits for matplotlib

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    loops = sorted({r.loops for r in results})
    axes.axvline(about["loops"], color="0.6", linestyle="--", linewidth=1)
    axes.annotate(
        f"trained at {about['loops']}",
        (about["loops"], 0 if "task" in about else 1),  # where the lines are not
        xycoords=("data", "axes fraction"),
        xytext=(-4, 16 if "task" in about else -12),
        ha="right",
        textcoords="offset points",
        color="0.4",
        fontsize=9,
    )
    draw(axes, results, about)
    axes.set_xscale("log", base=2)
    axes.set_xticks(loops, [str(n) for n in loops])
    axes.minorticks_off()
    axes.set_xlabel("loops")
    axes.margins(x=0.08, y=0.15)
    title = f"{about['name']}: {about['parameters']:,} parameters"
    if about["step"] is not None:
        title += f", step {about['step']:,}"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with path.open("wb") as file:
        figure.savefig(file, format="png")


def _draw_loss(axes: Any, results: Sequence[DepthResult], about: dict[str, Any]) -> None:
    loops, bits = [r.loops for r in results], [r.bits_per_byte for r in results]
    axes.plot(loops, bits, marker="o", color="#1f5fa8")
    for x, y in zip(loops, bits, strict=True):
        axes.annotate(f"{y:.2f}", (x, y), xytext=(5, 6), textcoords="offset points", fontsize=9)
    axes.set_ylabel("held-out bits per byte")


def _draw_exact_match(axes: Any, results: Sequence[TaskResult], about: dict[str, Any]) -> None:
    """A line per difficulty; dotted where it was not trained on."""
    for difficulty in sorted({r.difficulty for r in results}):
        points = [(r.loops, 100 * r.exact_match) for r in results if r.difficulty == difficulty]
        trained = difficulty in about["trained_on"]
        label = f"{difficulty}" + ("" if trained else "\n(not trained on)")
        axes.plot(*zip(*points, strict=True), marker="o", linestyle="-" if trained else ":", label=label)
    axes.set_ylim(-3, 103)
    axes.set_ylabel(f"{about['task']}: exact match, %")
    axes.legend(title="difficulty", fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
