"""`mythos retrofit`."""

import argparse
import json
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_jax.bounds import PositiveInt
from mythos_jax.commands.arguments import add_json, add_seed, integer_ranges, of_type, path
from mythos_jax.errors import DONE, FAILED, ConfigError

if TYPE_CHECKING:
    from mythos_jax.retrofit.cut import Cut

MOST_LAYERS = 1000  # of a part, as in `ModelConfig`
SUMMARY = "Make a looped model of a dense one: prelude, loop and coda are cut out of its layers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=path, metavar="SRC", help="a dense model: a directory, a file, a hub id, a run, or smollm2"
    )
    parser.add_argument("target", type=path, metavar="OUT", help="a directory that does not exist yet, or is empty")
    parser.add_argument(
        "--loop", type=layers, metavar="LAYERS", help="layers of the loop, such as 10-19 (default: the middle half)"
    )
    parser.add_argument(
        "--prelude", type=layers, metavar="LAYERS", help="layers before it, or none (default: all up to the loop)"
    )
    parser.add_argument(
        "--coda", type=layers, metavar="LAYERS", help="layers after it, or none (default: all from the loop on)"
    )
    parser.add_argument("--whole", action="store_true", help="all layers are the loop")
    parser.add_argument(
        "--loops", type=of_type(PositiveInt), default=4, metavar="N", help="depth of the looped model (default 4)"
    )
    parser.add_argument(
        "--adapter",
        choices=["input", "add", "random", "none"],
        default="input",
        help="what enters each loop: the prelude's output alone, so that nothing changes before training (input, the "
        "default), its sum with the state (add), both through a random matrix (random), or the state alone (none)",
    )
    parser.add_argument(
        "--initial-state",
        choices=["zeros", "noise", "injected"],
        help="the state before the first loop: zeros (the default), noise, or the prelude's output",
    )
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        help="a format of docs/weights.md (default: raven or nanbeige if one can express it, else mythos_jax)",
    )
    parser.add_argument("--text", metavar="TEXT", help="compare the logits on this text (default: one of its own)")
    parser.add_argument("--no-compare", action="store_true", help="run neither model, and compare nothing")
    add_seed(parser, "seed of a random adapter")
    add_json(parser)


def layers(text: str) -> tuple[int, ...]:
    """For argparse: 0-3,6 or none."""
    if text == "none":
        return ()
    try:
        ranges = integer_ranges(text)
        if not all(ranges):
            raise ValueError
    except ValueError:
        allowed = "layers such as 0-9 or 0-3,6, or none"
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: {allowed}") from None
    # One more than a part can have tells as much about a range without an end.
    return tuple(islice(chain(*ranges), MOST_LAYERS + 1))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.porting.reading import FileSource
    from mythos_jax.porting.writing import refuse_existing
    from mythos_jax.retrofit.comparison import DEPTHS, compare, make_sample
    from mythos_jax.retrofit.cut import dense_layers
    from mythos_jax.retrofit.report import RetrofitReport
    from mythos_jax.retrofit.surgery import Plan, require_dense, retrofit
    from mythos_jax.retrofit.training import training_cost
    from mythos_jax.runs.load import open_source

    _check_flags(arguments)
    refuse_existing(arguments.target)
    dense, out = open_source(arguments.source), Path(arguments.target)
    require_dense(dense)
    plan = Plan(
        _cut(arguments, len(dense_layers(dense.config))),
        arguments.loops,
        arguments.adapter,
        arguments.initial_state or "zeros",
        arguments.seed,
        arguments.to,
    )
    sample = None if arguments.no_compare else make_sample(dense, arguments.text)
    result = retrofit(dense, out, plan, progress=not arguments.json)
    report = RetrofitReport(
        out=out,
        plan=plan,
        dense=dense.config,
        result=result,
        comparison=None if sample is None else compare(dense, FileSource(out), sample),
        cost=training_cost(result.training, result.source.config, dense.config, DEPTHS),
    )
    print(json.dumps(report.as_dict()) if arguments.json else report.as_text())
    return FAILED if report.wrong_depths() else DONE


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that contradict each other."""
    if arguments.adapter == "none" and arguments.initial_state not in (None, "injected"):
        raise ConfigError(
            f"--initial-state: got {arguments.initial_state}, allowed: injected with --adapter none, or the prelude's "
            "output would enter nowhere"
        )
    given = [f"--{part}" for part in ("prelude", "loop", "coda") if getattr(arguments, part) is not None]
    if arguments.whole and given:
        raise ConfigError(f"{given[0]}: got with --whole, allowed: one of the two, since all layers are the loop there")


def _cut(arguments: argparse.Namespace, count: int) -> "Cut":
    """The cut that the flags ask for, of a model with `count` layers."""
    from mythos_jax.retrofit.cut import make_cut

    if arguments.whole:
        return make_cut(count, prelude=(), loop=tuple(range(count)), coda=())
    return make_cut(count, arguments.prelude, arguments.loop, arguments.coda)
