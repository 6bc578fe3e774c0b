"""`mythos train-predictor`."""

import argparse

from mythos_jax.bounds import PositiveInt
from mythos_jax.commands.arguments import add_base, add_step, of_type, path
from mythos_jax.errors import DONE

SUMMARY = "Train the head that predicts how many loops each token needs, on the rows of a run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="RUN")
    add_step(parser)
    add_base(parser)
    positive = of_type(PositiveInt)
    parser.add_argument(
        "--loops",
        type=positive,
        metavar="N",
        help="the largest number of loops it can predict (default: the config's)",
    )
    parser.add_argument("--rows", type=positive, default=512, metavar="N", help="rows to record (default 512)")
    parser.set_defaults(takes_overrides=("mesh",))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.runs.load import load_model
    from mythos_jax.runs.orbax_threads import quiet_background_errors
    from mythos_jax.training.predictor import train_predictor

    if not arguments.debug:
        quiet_background_errors()
    loaded = load_model(arguments.model, arguments.step, overrides=overrides, with_predictor=False, base=arguments.base)
    summary = train_predictor(loaded, loops=arguments.loops, rows=arguments.rows)
    print(f"{'mean loops':>10} {'KL to the final, nats':>22}")
    for loops, excess in zip(summary["mean_loops"], summary["excess_nats"], strict=True):
        print(f"{loops:>10.2f} {excess:>22.5f}")
    print(f"predictor: {loaded.directory / 'predictor'}; its own budget is {summary['budget']:.2f} loops")
    return DONE
