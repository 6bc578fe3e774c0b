"""p-hop induction: one layer in a loop compared with one pass of the same layer, over several seeds.

    .venv/bin/python -m benchmarks.p_hop

Trains configs/tasks/p_hop.yaml as it is and with one loop. Prints exact match by difficulty, and draws it against
loops. Finished runs are not repeated. A run takes a minute on one core.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.drawing import band, loops_axis, panels, save, tidy
from benchmarks.exact_match import TASKS, Results, exact_match, run
from benchmarks.runs import run_seeds
from mythos_jax.config import Config, load_config


def table(looped: list[Results], single: list[Results], config: Config) -> str:
    """Markdown: one row per difficulty, with mean and range over seeds."""

    def cell(values: np.ndarray) -> str:
        return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"

    lines = [
        f"| hops | one layer, {config.model.loops} loops | one pass of the same layer, same training |",
        "|---|---|---|",
    ]
    for difficulty in config.evaluation.difficulties:
        trained = "" if difficulty in config.data.task.difficulty else " (not trained on)"
        looped_cell = cell(exact_match(looped, difficulty, config.model.loops))
        lines.append(f"| {difficulty}{trained} | {looped_cell} | {cell(exact_match(single, difficulty, 1))} |")
    return "\n".join(lines)


def draw(looped: list[Results], single: list[Results], config: Config, path: Path) -> None:
    """Saves the curves: mean over seeds, and the range as a band; dotted if the difficulty was not trained on."""
    figure, (axes,) = panels(1)
    depths = config.evaluation.loops
    for difficulty in config.evaluation.difficulties:
        trained = difficulty in config.data.task.difficulty
        values = np.stack([exact_match(looped, difficulty, loops) for loops in depths], axis=1)
        label = f"{difficulty} hop{'s' if difficulty > 1 else ''}" + ("" if trained else " (not trained on)")
        band(axes, depths, values, linestyle="-" if trained else ":", label=label)
    hardest = max(config.data.task.difficulty)
    axes.plot(
        [1],
        [exact_match(single, hardest, 1).mean()],
        "kx",
        markersize=8,
        label=f"{hardest} hops, trained with one loop",
    )
    axes.axvline(config.model.loops, color="0.6", linestyle="--", linewidth=1)
    loops_axis(axes, depths, "loops at evaluation (dashed: the depth in training)")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("exact match, %")
    tidy(axes, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/p_hop"))
    args = parser.parse_args()
    runs = {
        name: run_seeds(TASKS / "p_hop.yaml", name, overrides, run, args.seeds, args.out)
        for name, overrides in [("looped", []), ("single", ["--model.loops", "1"])]
    }
    config = load_config(TASKS / "p_hop.yaml")
    print(table(runs["looped"], runs["single"], config))
    draw(runs["looped"], runs["single"], config, args.out / "p_hop.png")


if __name__ == "__main__":
    main()
