"""Arguments that several commands share: their values, and the flags that connect several processes."""

import argparse
import os
from typing import TYPE_CHECKING

from mythos_jax.errors import ConfigError

if TYPE_CHECKING:
    from mythos_jax.model.halting import Halting


def positive_integers(text: str) -> list[int]:
    """1,2,4 or 1-8, or both."""
    values: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            values += range(int(first), int(last) + 1) if dash else [int(part)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: integers >= 1, separated by commas") from None
    if min(values, default=0) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: integers >= 1")
    return values


def words(text: str) -> list[str]:
    """a,b"""
    return [word for word in text.split(",") if word]


def halting_policy(text: str) -> "Halting":
    """latent:0.03, or latent with its default threshold."""
    from mythos_jax.model.halting import Halting

    try:
        return Halting.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def halting_policies(text: str) -> "list[Halting]":
    """latent:0.03,kl:1e-3"""
    return [halting_policy(word) for word in text.split(",")]


def add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="use the checkpoint of this step (default: the newest)")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="FILE", help='for a model that has none: a tokenizer.json, or "bytes"')


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output, nothing else")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Flags of a command that can run as several processes; see `connect`."""
    group = parser.add_argument_group(
        "several processes", "detected under Slurm and on TPU hosts; see docs/multihost.md"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (or JAX_COORDINATOR_ADDRESS)")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes (or JAX_NUM_PROCESSES)")
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0 (or JAX_PROCESS_ID)")
    group.add_argument(
        "--connect-timeout", type=int, default=300, metavar="S", help="seconds to wait for all of them (default 300)"
    )
    group.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=100,
        metavar="S",
        help="seconds without a heartbeat after which a process counts as dead and the others exit (default 100)",
    )
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="cache compiled programs here, also gs://… (or JAX_COMPILATION_CACHE_DIR; default: no cache)",
    )


def connect(arguments: argparse.Namespace) -> None:
    """Sets up the compilation cache and joins the other processes of this command, if there are any."""
    from mythos_jax import cluster, connection

    cluster.cache_compilations(arguments.compilation_cache)
    found = cluster.find_cluster(os.environ, arguments.coordinator, arguments.processes, arguments.process_id)
    connection.connect(found, arguments.connect_timeout, arguments.heartbeat_timeout)
