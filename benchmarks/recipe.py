"""The ablations of docs/recipe.md: configs/house_tiny.yaml with one choice changed at a time, over several seeds.

    .venv/bin/python -m benchmarks.recipe [--only TEXT] [--seeds 0 1]

Each run trains for half of the config's steps, to leave time for more variants. Finished runs are not repeated, so the
script can be stopped at any time. A run takes two to five minutes on one core.
"""

import argparse
from pathlib import Path

from benchmarks.runs import DEPTHS, add_arguments, run_variants, table, train_and_evaluate

STEPS = ["--training.steps", "750"]
VARIANTS: dict[str, list[str]] = {
    "house": [],
    "no norm on the state": ["--model.state_norm", "false"],
    "no norm on the prelude's output": ["--model.prelude_norm", "false"],
    "the original's initialisation, std 0.02": ["--model.init_std", "0.02"],
    "the original's loop embedding, scale 1": ["--model.loop_embedding", "true"],
    "fixed depth 8, all loops with gradient": [
        "--training.depth.distribution=fixed",
        "--training.depth.backprop_loops=null",
    ],
    "random depth, all loops with gradient": ["--training.depth.backprop_loops", "null"],
    "Parcae's injection": ["--model.injection", "parcae"],
    "concatenating injection (Huginn)": ["--model.injection", "concat"],
    "Muon": ["--training.optimizer", "muon"],
}
# ACT reads out every loop, so all loops have gradients.
_ACT = ["--model.readout=act", *VARIANTS["fixed depth 8, all loops with gradient"]]
ACT: dict[str, list[str]] = {
    "ACT, without a ponder objective": _ACT,
    "ACT, ponder prior": [
        *_ACT,
        "--training.objectives.ponder_prior=0.1",
        "--training.objectives.ponder_prior_rate=0.1",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seeds=[0, 1], out=Path("runs/recipe"))
    overrides = {**VARIANTS, **ACT}
    rows = run_variants(
        parser.parse_args(), {name: ([*STEPS, *words], train_and_evaluate) for name, words in overrides.items()}
    )
    print(table(rows, DEPTHS))
    for name in (name for name in ACT if name in rows):
        used = ", ".join(f"{run['used']:.2f}" for run in rows[name])
        print(f"{name}: {used} loops contribute to each token")


if __name__ == "__main__":
    main()
