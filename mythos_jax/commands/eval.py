"""`mythos eval`."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_jax.bounds import PositiveInt
from mythos_jax.commands.arguments import (
    add_base,
    add_json,
    add_processes,
    add_seed,
    add_step,
    add_storage,
    add_tokenizer,
    connect,
    halting_policies,
    load_named,
    of_type,
    path,
    positive_integers,
    words,
)
from mythos_jax.errors import DONE, FAILED, ConfigError

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
        "--expected", action="store_true", help="also the expected logits of the model's exit gate, at each depth"
    )
    parser.add_argument(
        "--tasks", type=words, metavar="A,B", help="lm-evaluation-harness tasks or task files (needs lm_eval)"
    )
    parser.add_argument("--include-path", type=path, metavar="DIR", help="a folder with more task files, for --tasks")
    parser.add_argument(
        "--limit", type=of_type(PositiveInt), metavar="N", help="documents per task, for --tasks (default: all)"
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="folder of the report (default: report/ in the run; for other models reports/NAME)",
    )
    add_tokenizer(parser)
    add_seed(parser, "few-shot examples and sampling, for --tasks (default: the harness's own)", default=None)
    add_base(parser)
    add_storage(parser)
    add_json(parser)
    add_processes(parser)
    parser.set_defaults(takes_overrides=("mesh", "evaluation"))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.processes import is_process_zero
    from mythos_jax.report.page import write_report
    from mythos_jax.report.tables import format_table
    from mythos_jax.runs.orbax_threads import quiet_background_errors

    if not arguments.debug:
        quiet_background_errors()
    connect(arguments)
    lm = load_named(arguments, overrides)
    folder = _report_folder(arguments.out, lm)
    evaluation = _evaluate(arguments, lm, progress=not arguments.json and is_process_zero())
    failed = FAILED if evaluation.failures else DONE
    if not is_process_zero():
        return failed
    # The numbers first: they have taken long, and the report may be impossible to write.
    if arguments.json:
        print(json.dumps(evaluation.to_json(), allow_nan=False), flush=True)
    elif evaluation.results:
        print(format_table(evaluation), flush=True)
    if evaluation.results:
        try:
            numbers, page = write_report(folder, evaluation, command=arguments.command_line)
        except OSError as error:
            raise OSError(f"{folder}: the report cannot be written ({error.strerror}); allowed: --out DIR") from None
        if not arguments.json:
            print(f"report: {page}, {numbers}")
    for line in evaluation.failures:
        print(f"mythos: {line}", file=sys.stderr)
    return failed


def _report_folder(out: str | None, lm: "LanguageModel") -> Path:
    """Where the report goes. That of a pretrained model goes elsewhere: the model may be in a read-only cache.

    Warns at once if it looks as if it cannot be written.
    """
    from mythos_jax.paths import is_remote, to_path
    from mythos_jax.processes import log0

    if out is not None:
        folder = to_path(out)
    else:
        folder = Path("reports") / lm.config.name if lm.loaded.step is None else lm.loaded.directory / "report"
    if is_remote(folder):
        return folder
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        if out is not None:
            raise ConfigError(f"--out: {out}: cannot be written")
        log0(f"{folder}: cannot be written: there will be numbers but no report; allowed: --out DIR", logging.WARNING)
    return folder


def _evaluate(arguments: argparse.Namespace, lm: "LanguageModel", progress: bool) -> "Evaluation":
    settings = {"loops": arguments.loops, "halting": arguments.halting, "progress": progress}
    if not arguments.tasks:
        return lm.evaluate(arguments.data, expected=arguments.expected, with_loop_trace=True, **settings)
    if arguments.expected:
        raise ConfigError("--expected: got --tasks as well, allowed: held-out text or the problems of a run's task")
    return lm.evaluate_on_tasks(
        arguments.tasks,
        include_path=arguments.include_path,
        limit=arguments.limit,
        seed=arguments.seed,
        **settings,
    )
