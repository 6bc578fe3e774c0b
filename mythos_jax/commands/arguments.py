"""Arguments that several commands share: their values, and the flags that connect several processes."""

import argparse
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from mythos_jax.bounds import Between, NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from mythos_jax.errors import ConfigError
from mythos_jax.paths import expand

if TYPE_CHECKING:
    from mythos_jax.inference.text import RowOptions
    from mythos_jax.language_model import LanguageModel
    from mythos_jax.model.halting import Halting


_LONGEST_LIST = 1000  # depths; each is a measurement


def of_type(hint: Any) -> Callable[[str], Any]:
    """For argparse: reads a word as a config field of this annotated type is read, and checks its bounds."""

    def parse(text: str) -> Any:
        from mythos_jax.config.overrides import parse_value
        from mythos_jax.typed import check_value

        try:
            value = parse_value(text, hint, "")
            check_value(value, hint, "")
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None
        return value

    return parse


def path(text: str) -> str:
    """For argparse: a path, with `~` and environment variables expanded."""
    try:
        if text:
            return expand(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    raise argparse.ArgumentTypeError("got '', allowed: a path")


def integer_ranges(text: str) -> list[range]:
    """1,2,4 or 1-8, or both. Raises ValueError for anything else; a range whose ends are reversed is empty."""
    ends = [part.partition("-") for part in text.split(",")]
    return [range(int(first), int(last if dash else first) + 1) for first, dash, last in ends]


def positive_integers(text: str) -> list[int]:
    """1,2,4 or 1-8, or both."""
    try:
        ranges = integer_ranges(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: integers >= 1, separated by commas") from None
    if any(len(part) == 0 or part[0] < 1 or part[-1] >= 2**31 for part in ranges):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: integers >= 1")
    if sum(map(len, ranges)) > _LONGEST_LIST:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: at most {_LONGEST_LIST} integers")
    return [value for part in ranges for value in part]


def byte_count(text: str) -> int:
    """2GiB, 512MB, 1000000."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([kmgt]?)(i?b)?", text.strip().lower())
    base = 1000 if found and found[3] == "b" else 1024
    count = float(found[1]) * base ** " kmgt".index(found[2] or " ") if found else 0
    if not 1 <= count < 2**60:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: a number of bytes, such as 2GiB, 512MB or 1000000")
    return int(count)


def words(text: str) -> list[str]:
    """a,b"""
    found = [path(word) for word in text.split(",") if word]
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: names or files, separated by commas")
    return found


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


def loop_cache(text: str) -> str:
    """all, last, first, modulo:4"""
    from mythos_jax.model.cache import LOOP_CACHES, loop_slots

    try:
        loop_slots(text, 1)
    except ConfigError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: {LOOP_CACHES}") from None
    return text


def add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step", type=of_type(PositiveInt), metavar="N", help="use the checkpoint of this step (default: the newest)"
    )


def add_seed(parser: argparse.ArgumentParser, use: str, default: int | None = 0) -> None:
    """default: None if `use` says what that is."""
    words = use if default is None else f"{use} (default {default})"
    parser.add_argument("--seed", type=of_type(Seed), default=default, metavar="N", help=words)


def add_loop_cache(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--loop-cache",
        type=loop_cache,
        default="all",
        metavar="RULE",
        help="loops that the cache keeps: all (the default), or to save memory, as an approximation, last, first "
        "(the first and the last), or modulo:N (loop t in place t mod N)",
    )


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=path,
        metavar="FILE",
        help='for a model without one: a tokenizer.json, a model, or "bytes"',
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    """How text is generated; see `generation_options`."""
    positive = of_type(PositiveInt)
    parser.add_argument("--loops", type=positive, metavar="N", help="depth (default: the config's)")
    parser.add_argument(
        "--halting", type=halting_policy, metavar="CRITERION[:T]", help="let tokens stop early: act, latent:0.03, kl, …"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="tokens to generate (default: as many as fit in the model's context, at most 128, in a chat 512)",
    )
    parser.add_argument(
        "--temperature", type=of_type(NonNegativeFloat), default=0.0, metavar="T", help="0 (the default) is greedy"
    )
    parser.add_argument(
        "--top-k",
        type=of_type(NonNegativeInt),
        default=0,
        metavar="K",
        help="sample from the K most likely tokens; 0 (the default): all",
    )
    parser.add_argument(
        "--top-p",
        type=of_type(Annotated[float, Between(0, 1, "(]")]),
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens of total mass P",
    )
    add_seed(parser, "random seed")
    parser.add_argument(
        "--draft-loops",
        type=positive,
        metavar="D",
        help="draft tokens with D loops and verify them at full depth: the same text, faster",
    )
    parser.add_argument("--draft-tokens", type=positive, default=3, metavar="N", help="tokens per draft (default 3)")
    add_loop_cache(parser)
    parser.add_argument(
        "--prefill-chunk",
        type=positive,
        metavar="N",
        help="prompt tokens processed at a time (default 512, in a chat 64)",
    )


def generation_options(arguments: argparse.Namespace) -> "RowOptions":
    """The keywords of generation that `add_generation` has read."""
    options: RowOptions = {
        "loops": arguments.loops,
        "halting": arguments.halting,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "draft_loops": arguments.draft_loops,
        "draft_tokens": arguments.draft_tokens,
        "loop_cache": arguments.loop_cache,
    }
    return options if arguments.prefill_chunk is None else {**options, "prefill_chunk": arguments.prefill_chunk}


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Where a conversation starts, and how it is written."""
    parser.add_argument("--system", metavar="TEXT", help="a system message, before the first question")
    parser.add_argument(
        "--chat-template", type=path, metavar="FILE", help="a Jinja template (default: the model's own)"
    )


def load_named(arguments: argparse.Namespace, overrides: list[str]) -> "LanguageModel":
    """The model that the command names, with its `--step`, `--tokenizer`, `--base`, `--dtype` and `--weights`."""
    from mythos_jax.language_model import load

    return load(
        arguments.model,
        step=arguments.step,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        weights=arguments.weights,
        overrides=overrides,
        base=arguments.base,
    )


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=path,
        metavar="MODEL",
        help="of a PEFT directory or a LoRA run: where the model is that it belongs to (default: where it says)",
    )


def add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the weights in memory (default float32); the others take half the memory",
    )
    parser.add_argument(
        "--weights", choices=["int8"], help="the matrices as int8: a quarter of the memory, and faster decoding"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output, nothing else")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Flags of a command that can run as several processes; see `connect`."""
    group = parser.add_argument_group(
        "several processes", "detected under Slurm and on TPU hosts; see docs/multihost.md"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (or JAX_COORDINATOR_ADDRESS)")
    positive = of_type(PositiveInt)
    group.add_argument("--processes", type=positive, metavar="N", help="number of processes (or JAX_NUM_PROCESSES)")
    group.add_argument(
        "--process-id",
        type=of_type(NonNegativeInt),
        metavar="I",
        help="index of this process, from 0 (or JAX_PROCESS_ID)",
    )
    group.add_argument(
        "--connect-timeout",
        type=positive,
        default=300,
        metavar="S",
        help="seconds to wait for all of them (default 300)",
    )
    group.add_argument(
        "--heartbeat-timeout",
        type=positive,
        default=100,
        metavar="S",
        help="seconds without a heartbeat after which a process counts as dead and the others exit (default 100)",
    )
    add_compilation_cache(parser)


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compilation-cache",
        type=path,
        metavar="DIR",
        help="cache compiled programs here, also gs://… (or JAX_COMPILATION_CACHE_DIR; default: no cache)",
    )


def connect(arguments: argparse.Namespace) -> None:
    """Sets up the compilation cache and joins the other processes of this command, if there are any."""
    from mythos_jax import cluster, connection

    cluster.cache_compilations(arguments.compilation_cache)
    found = cluster.find_cluster(os.environ, arguments.coordinator, arguments.processes, arguments.process_id)
    connection.connect(found, arguments.connect_timeout, arguments.heartbeat_timeout)
