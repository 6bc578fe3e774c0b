"""`mythos eval`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_jax.commands.arguments import (
    add_json,
    add_processes,
    add_seed,
    add_step,
    add_tokenizer,
    connect,
    halting_policies,
    of_type,
    path,
    positive_integers,
    words,
)
from mythos_jax.errors import DONE
from mythos_jax.typed import PositiveInt

if TYPE_CHECKING:
    from mythos_jax.evaluation.results import Evaluation
    from mythos_jax.language_model import LanguageModel

SUMMARY = "Evaluate a run or a pretrained model at several depths and with halting policies."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="RUN|MODEL")
    parser.add_argument(
        "--data", type=path, metavar="DIR", help="prepared rows to evaluate on (default: the run's own)"
    )
    add_step(parser)
    parser.add_argument(
        "--loops", type=positive_integers, metavar="1,2,4", help="depths, also 1-8 (default: the config's)"
    )
    parser.add_argument(
        "--halting",
        type=halting_policies,
        action="extend",
        default=[],
        metavar="CRITERION[:T],…",
        help="also let tokens stop early, within the largest depth: latent:0.03,latent:0.1; without T: a sweep",
    )
    parser.add_argument(
        "--tasks", type=words, metavar="A,B", help="lm-evaluation-harness tasks or task files (needs lm_eval)"
    )
    parser.add_argument("--include-path", type=path, metavar="DIR", help="a folder with more task files, for --tasks")
    parser.add_argument(
        "--limit", type=of_type(PositiveInt), metavar="N", help="documents per task, for --tasks (default: all)"
    )
    add_tokenizer(parser)
    add_seed(parser, "few-shot examples and sampling, for --tasks")
    add_json(parser)
    add_processes(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.language_model import load
    from mythos_jax.processes import is_process_zero
    from mythos_jax.report.page import write_report
    from mythos_jax.report.tables import format_table

    connect(arguments)
    lm = load(arguments.model, step=arguments.step, tokenizer=arguments.tokenizer)
    evaluation = _evaluate(arguments, lm, progress=not arguments.json and is_process_zero())
    if not is_process_zero():
        return DONE
    # The report of a pretrained model goes elsewhere: the model may be in a read-only cache.
    folder = Path("reports") / lm.config.name if lm.loaded.step is None else lm.loaded.directory / "report"
    numbers, page = write_report(folder, evaluation, command=arguments.command_line)
    if arguments.json:
        print(json.dumps(evaluation.to_json()))
    else:
        print(format_table(evaluation))
        print(f"report: {page}, {numbers}")
    return DONE


def _evaluate(arguments: argparse.Namespace, lm: "LanguageModel", progress: bool) -> "Evaluation":
    settings = {"loops": arguments.loops, "halting": arguments.halting, "progress": progress}
    if not arguments.tasks:
        return lm.evaluate(arguments.data, with_loop_trace=True, **settings)
    return lm.evaluate_on_tasks(
        arguments.tasks,
        include_path=arguments.include_path,
        limit=arguments.limit,
        seed=arguments.seed,
        **settings,
    )
