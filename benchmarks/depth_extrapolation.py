"""Loss against depth: the PyTorch original and ours, trained on the same bytes with the same budget.

    make test-torch ARGS=--collect-only        # makes .venv-torch
    .venv-torch/bin/python -m benchmarks.depth_extrapolation

Every run is paired: one seed gives both the same batches in the same order, 1,500 steps of 16 x 96 bytes of Python's
standard library, AdamW with the same schedule, and the same held-out files. A run that is done is not made again, so
the script may be stopped at any time; about ten minutes a run on one core.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import original
from benchmarks.runs import DEPTHS, HOUSE, batches_of, once, ours, slug, table
from mythos_jax.config import Config, load_config

RANDOM_DEPTHS = (2, 3, 4, 6, 8)


def run_original(config: Config, *, halting: bool, random_depth: bool) -> dict[int, float]:
    seed = config.training.seed
    batches, held_out = batches_of(config)
    model = original.build(config.model, seed, halting=halting)
    drawn = np.random.default_rng(seed)
    bar = tqdm(total=config.training.steps, desc=f"original, seed {seed}", unit="step")

    def report(step: int, loss: float) -> None:
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    original.train(
        model,
        config.training,
        batches,
        lambda _: int(drawn.choice(RANDOM_DEPTHS)) if random_depth else config.model.loops,
        report,
    )
    bar.close()
    return original.evaluate(model, held_out, DEPTHS)


# Name in the table -> what makes its losses.
VARIANTS: dict[str, Callable[[Config, Path], dict[int, float]]] = {
    "original": lambda config, _: run_original(config, halting=True, random_depth=False),
    "original, random depth": lambda config, _: run_original(config, halting=True, random_depth=True),
    "original without ACT": lambda config, _: run_original(config, halting=False, random_depth=False),
    "original without ACT, random depth": lambda config, _: run_original(config, halting=False, random_depth=True),
    "ours": ours,
}


def verdict(rows: dict[str, list[dict[str, float]]]) -> str:
    def means(name: str) -> dict[int, float]:
        return {d: float(np.mean([run[str(d)] for run in rows[name]])) for d in DEPTHS}

    mine = means("ours")
    theirs = {name: min(means(name).values()) for name in rows if name != "ours"}
    best = min(theirs, key=lambda name: theirs[name])
    return (
        f"best depth: ours {min(mine.values()):.3f}, {best} {theirs[best]:.3f} nats per byte\n"
        f"at {DEPTHS[-1]} loops ours is {mine[DEPTHS[-1]] - min(mine.values()):.3f} above its own best"
    )


def draw(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = iter(["C1", "C2", "C3", "C4"])
    for name, runs in rows.items():
        losses = np.array([[run[str(d)] for d in DEPTHS] for run in runs])
        style: dict[str, Any] = {"color": "#1f5fa8", "linewidth": 2.2} if name == "ours" else {"color": next(colours)}
        (line,) = axes.plot(DEPTHS, losses.mean(0), marker="o", markersize=4, label=name, **style)
        axes.fill_between(DEPTHS, losses.min(0), losses.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
    axes.axvline(8, color="0.6", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEPTHS, [str(d) for d in DEPTHS])
    axes.minorticks_off()
    axes.set_xlabel("loops at evaluation (dashed: the depth trained at)")
    axes.set_ylabel("held-out nats per byte")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="run just the variants whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("runs/depth_extrapolation"))
    parser.add_argument("--made", action="store_true", help="train nothing: the table of the runs that are made")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it likes")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    rows: dict[str, list[dict[str, float]]] = {}
    for name, make in VARIANTS.items():
        for seed in args.seeds:
            if args.only and args.only not in name:
                continue
            config = load_config(HOUSE, ["--training.seed", str(seed), "--data.path", str(args.out / "data")])
            work = args.out / f"{slug(name)}_{seed}"
            if args.made and not work.with_suffix(".json").is_file():
                continue
            rows.setdefault(name, []).append(once(work.with_suffix(".json"), partial(make, config, work)))
    if not rows:
        sys.exit(f"--only: got {args.only!r}, allowed: part of one of {', '.join(VARIANTS)}")
    text = table(rows, DEPTHS)
    print(text)
    if "ours" in rows and len(rows) > 1:
        print(verdict(rows))
    draw(rows, args.out / "depth_extrapolation.png")


if __name__ == "__main__":
    main()
