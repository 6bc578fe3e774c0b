"""`mythos compile`."""

import argparse
import json
import os

from mythos_jax.bounds import NonNegativeFloat, NonNegativeInt, PositiveInt
from mythos_jax.commands.arguments import add_json, of_type, path
from mythos_jax.errors import DONE, FAILED

SUMMARY = "Compile for TPUs or GPUs that are not attached: does it fit into memory, and what limits a step?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path, metavar="CONFIG")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:16x16, h100:8 or h100:2x8")
    parser.add_argument(
        "--slices",
        type=of_type(PositiveInt),
        default=1,
        metavar="N",
        help="slices, connected by the data centre network (default 1)",
    )
    parser.add_argument("--decode", action="store_true", help="compile the decode step instead of the train step")
    parser.add_argument("--quick", action="store_true", help="less compile time, with rougher estimates of speed")
    parser.add_argument(
        "--top", type=of_type(NonNegativeInt), default=0, metavar="N", help="list the N largest causes of a step's time"
    )
    parser.add_argument(
        "--price",
        type=of_type(NonNegativeFloat),
        default=0,
        metavar="PRICE",
        help="what a chip costs per hour, for the price of the whole run",
    )
    add_json(parser)
    parser.set_defaults(takes_overrides=True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    # Set before jax is imported, so that it does not claim a local TPU, which may be in use. Programs for devices that
    # are not attached cannot be read from the compilation cache.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    from mythos_jax.preflight.report import preflight
    from mythos_jax.preflight.text import report_text
    from mythos_jax.preflight.topology import parse_topology
    from mythos_jax.runs.configs import load_config

    topology = parse_topology(arguments.topology, arguments.slices)
    config = load_config(arguments.config, overrides)
    report = preflight(config, topology, decode=arguments.decode, quick=arguments.quick)
    shown = {"top": arguments.top, "price": arguments.price}
    print(json.dumps(report.as_dict(**shown)) if arguments.json else report_text(report, **shown))
    return DONE if report.fits else FAILED
