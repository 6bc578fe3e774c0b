"""The ablation table of docs/recipe.md: configs/house_tiny.yaml with one choice changed at a time, over seeds.

    .venv/bin/python -m benchmarks.recipe [--only TEXT] [--seeds 0 1]

Half the steps of the config, so that there is time for more rows. Runs that are done are not made again, so it may be
stopped at any time; two to five minutes a run on one core.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks.runs import DEPTHS, HOUSE, once, ours, slug, table
from mythos_jax.config import load_config

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
# ACT needs the output of every loop, so all have gradients.
_ACT = ["--model.readout=act", *VARIANTS["fixed depth 8, all loops with gradient"]]
ACT: dict[str, list[str]] = {
    "ACT, nothing asked of it": _ACT,
    "ACT, ponder prior": [
        *_ACT,
        "--training.objectives.ponder_prior=0.1",
        "--training.objectives.ponder_prior_rate=0.1",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", default="", help="run just the variants whose name has this in it")
    parser.add_argument("--made", action="store_true", help="train nothing: the table of the runs that are made")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for name, words in {**VARIANTS, **ACT}.items():
        for seed in args.seeds:
            if args.only not in name:
                continue
            run = ["--training.seed", str(seed), "--data.path", str(args.out / "data")]
            config = load_config(HOUSE, [*STEPS, *words, *run])
            work = args.out / f"{slug(name)}_{seed}"
            if args.made and not work.with_suffix(".json").is_file():
                continue
            rows.setdefault(name, []).append(once(work.with_suffix(".json"), partial(ours, config, work)))
    if not rows:
        sys.exit(f"--only: got {args.only!r}, allowed: part of one of {', '.join([*VARIANTS, *ACT])}")
    print(table(rows, DEPTHS))
    for name in (name for name in ACT if name in rows):
        used = ", ".join(f"{run['used']:.2f}" for run in rows[name])
        print(f"{name}: {used} loops contribute to a token")


if __name__ == "__main__":
    main()
