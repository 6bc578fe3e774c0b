"""What each choice in configs/quickstart.yaml is worth: one of them taken back at a time, at the same training FLOPs.

    .venv/bin/python -m benchmarks.quickstart [--only TEXT] [--seeds 0 1 2]

Each run trains for a quarter of the config's steps, to leave time for more variants; a variant gets as many steps as
the same training FLOPs pay for, counted with the depths that are run, and sees the same rows in the same order.
Finished runs are not repeated, so the script can be stopped at any time. A run takes about a minute on one core.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.runs import Losses, add_arguments, run_variants, table, train_and_evaluate
from mythos_jax.config import load_config
from mythos_jax.flops import training_flops

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
DEPTHS = (1, 2, 3, 6, 12)
FIXED = ["--training.depth.distribution=fixed", "--training.depth.backprop_loops=null"]
VARIANTS: dict[str, list[str]] = {
    "quickstart": [],
    "AdamW, learning rate 2e-3": ["--training.optimizer=adamw", "--training.learning_rate=2e-3"],
    "fixed depth 3, all loops with gradient": FIXED,
    "mean depth 4": ["--model.loops=4"],
    "mean depth 2": ["--model.loops=2"],
    "initialisation, std 0.02": ["--model.init_std=0.02"],
    "Muon's learning rate 0.04": ["--training.muon_learning_rate=0.04"],
    "batches of 16": ["--training.batch_size=16"],
    "last learning rate a tenth of the peak": ["--training.final_learning_rate_fraction=0.1"],
}


def at_equal_flops(overrides: list[str]) -> list[str]:
    """The overrides, with the number of steps that costs as much as a quarter of the quickstart's."""
    reference, config = load_config(QUICKSTART), load_config(QUICKSTART, overrides)
    steps = round(reference.training.steps / 4 * training_flops(reference) / training_flops(config))
    return [*overrides, f"--training.steps={steps}"]


def differences(rows: dict[str, list[Losses]]) -> str:
    """Markdown: for each variant, at its best depth, nats per byte above the quickstart at its own, seed by seed."""

    def best(runs: list[Losses]) -> list[float]:
        depth = min(DEPTHS, key=lambda depth: statistics.mean(run[str(depth)] for run in runs))
        return [run[str(depth)] for run in runs]

    lines = ["| variant | paired differences, by seed | mean |", "|---|---|---|"]
    ours = best(rows["quickstart"])
    for name, runs in rows.items():
        if name != "quickstart":
            pairs = [theirs - own for theirs, own in zip(best(runs), ours, strict=False)]
            lines.append(f"| {name} | {', '.join(f'{x:+.3f}' for x in pairs)} | {statistics.mean(pairs):+.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seeds=[0, 1, 2], out=Path("runs/recipe_quickstart"))
    variants = {name: (at_equal_flops(words), train_and_evaluate) for name, words in VARIANTS.items()}
    rows = run_variants(parser.parse_args(), variants, QUICKSTART)
    print(table(rows, DEPTHS))
    if "quickstart" in rows:
        print(f"\n{differences(rows)}")


if __name__ == "__main__":
    main()
