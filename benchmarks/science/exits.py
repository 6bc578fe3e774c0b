"""Ways to stop, at equal mean loops: learned gates, a predictor, zero-shot criteria and ACT, on text and on a task.

    .venv/bin/python -m benchmarks.science.exits [--size gpu] [--seeds 0 1 2] [--problems text group] [--finished]

Models of one shape, each trained in its own way; all but ACT's are then stopped in every way. Stage I trains gate and
model together (the expected loss over the exits), stage II a gate alone, on the frozen model; the predictor is trained
on the frozen model too. What is measured, and how thresholds are chosen: benchmarks.sweeps.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from benchmarks.drawing import panels, save, tidy
from benchmarks.runs import run_seeds
from benchmarks.science.frame import TEXT, bracket, folder, interval, parser_of, save_json, spread
from benchmarks.science.stopping import PREFIX, PROBLEMS, Problem, train_and_stop
from benchmarks.sweeps import FIXED, Curve, fixed_at
from benchmarks.timing import print_header, print_row

Runs = list[dict[str, Curve]]  # of one model: for each seed, the curve of each way to stop it
Found = dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]]  # model, way -> for each budget, `values_at`
LABELS = {"nats": "nats per byte", "right": "fraction of answers that are right"}
LINES: dict[str, Any] = {
    FIXED: "-",
    "kl": ":",
    "predicted": (0, (1, 3)),
    "gate, stage I": "--",
    "gate, stages I + II": "-.",
    "gate, stage II alone": "-.",
    "act": "--",
}


def train_models(arguments: argparse.Namespace, problem: Problem) -> dict[str, Runs]:
    """By the name of each model that is chosen. Finished ones are read from disk."""
    out, run = folder(arguments), partial(train_and_stop, rows=problem.rows)
    path = ["--data.path", str(out / "data")] if problem.base == TEXT else []
    models: dict[str, Runs] = {}
    for model, (name, words) in problem.models(arguments.size).items():
        if arguments.only in model:
            how = problem.base, PREFIX + name, [*words, *path], run, arguments.seeds, out
            found = run_seeds(*how, finished=arguments.finished)
            models[model] = [{way: Curve.of(lists) for way, lists in seed.items()} for seed in found]
    models = {model: runs for model, runs in models.items() if runs}
    if not models:
        sys.exit(f"--only, --finished: no run is left in {out} of {', '.join(problem.models(arguments.size))}")
    return models


def values_at(runs: Runs, way: str, loops: float, field: str) -> tuple[np.ndarray, np.ndarray]:
    """What a way gives at these mean loops, and that minus fixed depths of the same model at the mean loops that it has
    run; one number for each seed, or none at all if it cannot run so many with each."""
    points = [point for curves in runs if (point := curves[way].at(loops))]
    if len(points) < len(runs):
        return np.array([]), np.array([])
    fixed = [fixed_at(curves[FIXED], point.loops) for curves, point in zip(runs, points, strict=True)]
    values, others = (np.array([getattr(point, field) for point in at]) for at in (points, fixed))
    return values, values - others


def mean_of(values: np.ndarray) -> tuple[float, float, float]:
    return interval(len(values), lambda seeds: float(values[seeds].mean()))


def print_tables(name: str, problem: Problem, models: Mapping[str, Runs]) -> Found:
    found: Found = {
        (model, way): [values_at(runs, way, budget, problem.field) for budget in problem.budgets]
        for model, runs in models.items()
        for way in runs[0]
    }
    columns = [f"{budget:g} loops" for budget in problem.budgets]
    print(f"\n{name}, {problem.field}:\n")
    print_header("trained with", "stopped by", "seeds", *columns)
    for (model, way), at in found.items():
        print_row(model, way, len(models[model]), *(spread(values) if len(values) else "" for values, _ in at))
    print(f"\n{name}, {problem.field}, minus fixed depths of the same model at the same mean loops:\n")
    print_header("trained with", "stopped by", *columns)
    for (model, way), at in found.items():
        if way != FIXED:
            print_row(model, way, *(bracket(mean_of(more), 3) if len(more) else "" for _, more in at))
    return found


def draw(axes: Any, models: Mapping[str, Runs], problem: Problem) -> None:
    """A colour for each model, a kind of line for each way."""
    budgets = np.linspace(problem.budgets[0] - 0.5, problem.budgets[-1] + 0.5, 25).tolist()
    ways: dict[str, Line2D] = {}
    for i, runs in enumerate(models.values()):
        for way in [way for way in LINES if way in runs[0]]:
            values = [values_at(runs, way, loops, problem.field)[0] for loops in budgets]
            means = [found.mean() if len(found) else np.nan for found in values]
            axes.plot(budgets, means, linestyle=LINES[way], color=f"C{i}")
            ways[way] = Line2D([], [], color="0.4", linestyle=LINES[way], label=way)
    axes.set(xlabel="mean loops", ylabel=LABELS[problem.field])
    colours = [Line2D([], [], color=f"C{i}", label=model) for i, model in enumerate(models)]
    tidy(axes, handles=[*colours, *ways.values()], loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def main(words: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    arguments = parser.parse_args(words)
    figure, axes = panels(len(arguments.problems))
    results = {}
    for name, ax in zip(arguments.problems, axes, strict=True):
        problem = PROBLEMS[name]
        models = train_models(arguments, problem)
        found = print_tables(name, problem, models)
        results[name] = {
            "loops": problem.budgets,
            "values": {"; ".join(key): [values.tolist() for values, _ in at] for key, at in found.items()},
            "minus fixed": {"; ".join(key): [more.tolist() for _, more in at] for key, at in found.items()},
        }
        draw(ax, models, problem)
    save(figure, folder(arguments) / "exits.png")
    save_json(arguments, "exits", results)


if __name__ == "__main__":
    main()
