"""Loss against depth: the PyTorch original and ours, trained on the same bytes with the same budget.

    make test-torch ARGS=--collect-only        # creates .venv-torch
    .venv-torch/bin/python -m benchmarks.depth_extrapolation

Runs are paired: with one seed, both get the same batches in the same order (1,500 steps of 16 x 96 bytes of Python's
standard library), AdamW with the same schedule, and the same held-out files. Finished runs are not repeated, so the
script can be stopped at any time. A run takes about ten minutes on one core.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import original
from benchmarks.drawing import band, loops_axis, panels, save, tidy
from benchmarks.runs import DEPTHS, Losses, Variant, add_arguments, batches_of, run_variants, table, train_and_evaluate
from mythos_jax.config import Config

RANDOM_DEPTHS = (2, 3, 4, 6, 8)


def run_original(config: Config, *, halting: bool, random_depth: bool) -> Losses:
    """Trains the original, with its ACT or without, at the config's depth or a random one per step; evaluates it."""
    seed = config.training.seed
    batches, held_out = batches_of(config)
    model = original.build(config.model, seed, halting=halting)
    depths = np.random.default_rng(seed)
    bar = tqdm(total=config.training.steps, desc=f"original, seed {seed}", unit="step")

    def report(step: int, loss: float) -> None:
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    original.train(
        model,
        config.training,
        batches,
        lambda _: int(depths.choice(RANDOM_DEPTHS)) if random_depth else config.model.loops,
        report,
    )
    bar.close()
    return original.evaluate(model, held_out, DEPTHS)


def original_variant(*, halting: bool, random_depth: bool) -> Variant:
    return [], lambda config, _: run_original(config, halting=halting, random_depth=random_depth)


VARIANTS: dict[str, Variant] = {
    "original": original_variant(halting=True, random_depth=False),
    "original, random depth": original_variant(halting=True, random_depth=True),
    "original without ACT": original_variant(halting=False, random_depth=False),
    "original without ACT, random depth": original_variant(halting=False, random_depth=True),
    "ours": ([], train_and_evaluate),
}


def summary(rows: dict[str, list[Losses]]) -> str:
    """Ours and the best of the originals, each at its best depth; and what ours loses at the greatest depth."""

    def means(name: str) -> dict[int, float]:
        return {depth: float(np.mean([run[str(depth)] for run in rows[name]])) for depth in DEPTHS}

    ours = means("ours")
    theirs = {name: min(means(name).values()) for name in rows if name != "ours"}
    best = min(theirs, key=lambda name: theirs[name])
    return (
        f"best depth: ours {min(ours.values()):.3f}, {best} {theirs[best]:.3f} nats per byte\n"
        f"at {DEPTHS[-1]} loops ours is {ours[DEPTHS[-1]] - min(ours.values()):.3f} above its own best"
    )


def draw(rows: dict[str, list[Losses]], path: Path) -> None:
    """Saves the curves: mean over seeds, and the range as a band."""
    figure, (axes,) = panels(1)
    colours = iter(["C1", "C2", "C3", "C4"])
    for name, runs in rows.items():
        losses = np.array([[run[str(depth)] for depth in DEPTHS] for run in runs])
        style: dict[str, Any] = {"color": "#1f5fa8", "linewidth": 2.2} if name == "ours" else {"color": next(colours)}
        band(axes, DEPTHS, losses, label=name, **style)
    axes.axvline(8, color="0.6", linestyle="--", linewidth=1)
    loops_axis(axes, DEPTHS, "loops at evaluation (dashed: the depth in training)")
    axes.set_ylabel("held-out nats per byte")
    tidy(axes)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seeds=[0, 1, 2], out=Path("runs/depth_extrapolation"))
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    rows = run_variants(args, VARIANTS)
    print(table(rows, DEPTHS))
    if "ours" in rows and len(rows) > 1:
        print(summary(rows))
    draw(rows, args.out / "depth_extrapolation.png")


if __name__ == "__main__":
    main()
