"""`mythos`: one subcommand per job. Exit codes: 0 done, 1 failed, 2 wrong input, 42 start the same command again
(stopped by SIGTERM and saved, or another process of the run was lost), 130 stopped by Ctrl-C."""

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mythos_jax.errors import FAILED, INTERRUPTED, RESTART, WRONG_INPUT, ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; errors a user can cause become one line on standard error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments, rest = _parser().parse_known_args(argv)
    arguments.command_line = shlex.join(["mythos", *argv])
    if rest and not arguments.takes_overrides:
        print(f"mythos: got {rest[0]!r}, which `mythos {arguments.command}` does not know; see --help", file=sys.stderr)
        return WRONG_INPUT
    # A program with text output on a small device need not preload a GPU's whole memory, or log how XLA starts.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return arguments.run(arguments, rest) or 0
    except KeyboardInterrupt:
        print("mythos: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        if "jax" in sys.modules:
            return _end_together(error, code, arguments.debug)
        if arguments.debug or code is None:
            raise
        print(f"mythos: {error}", file=sys.stderr)
        return code


def _end_together(error: Exception, code: int | None, debug: bool) -> int:
    """As `main` ends with an error; of several processes none waits for others that may be waiting for it."""
    from mythos_jax.errors import Interrupted
    from mythos_jax.processes import exit_now, is_process_zero, is_single_process, lost_a_process, process_prefix

    if lost_a_process(error):
        cause = " ".join(str(error).split())[:200]
        code, error = RESTART, RuntimeError(f"another process of this run is gone ({cause})")
    stopped = isinstance(error, Interrupted)  # all processes are here, at the same step
    if is_single_process() and (debug or code is None):
        raise error
    if debug or code is None:
        traceback.print_exception(error)
    elif is_process_zero() or not stopped:
        print(f"mythos: {process_prefix()}{error}", file=sys.stderr)
    if not stopped:
        exit_now(FAILED if code is None else code)
    return FAILED if code is None else code


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that is no bug of ours, else None."""
    if isinstance(error, ConfigError):
        return WRONG_INPUT
    from mythos_jax.errors import Interrupted, TrainingError  # they only exist where training does

    if isinstance(error, Interrupted):
        return RESTART if error.signal == signal.SIGTERM else INTERRUPTED
    return FAILED if isinstance(error, TrainingError | OSError) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mythos", description="Recurrent-depth transformers in JAX.")
    parser.set_defaults(takes_overrides=False, debug=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str, under=commands) -> argparse.ArgumentParser:
        sub = under.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    def processes(sub: argparse.ArgumentParser) -> None:
        """Flags of a command that several processes can run as one."""
        group = sub.add_argument_group("several processes", "not needed under Slurm and on TPUs; see docs/multihost.md")
        group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (or JAX_COORDINATOR_ADDRESS)")
        group.add_argument("--processes", type=int, metavar="N", help="how many there are (or JAX_NUM_PROCESSES)")
        group.add_argument("--process-id", type=int, metavar="I", help="which this one is, from 0 (or JAX_PROCESS_ID)")
        group.add_argument(
            "--connect-timeout", type=int, default=300, metavar="S", help="seconds to wait for all (default 300)"
        )
        group.add_argument(
            "--heartbeat-timeout",
            type=int,
            default=100,
            metavar="S",
            help="seconds after which a silent process counts as dead and the others end (default 100)",
        )
        sub.add_argument(
            "--compilation-cache",
            metavar="DIR",
            help="keep compiled programs here, also gs://… (or JAX_COMPILATION_CACHE_DIR; default: nowhere)",
        )

    sub = command("train", _train, "Train a model, or go on with a run. Any field: --section.field value.")
    sub.add_argument("config", metavar="CONFIG.yaml")
    sub.add_argument("--workdir", metavar="DIR", help="the run directory (default runs/NAME)")
    sub.add_argument("--init-from", metavar="MODEL", help="start from the weights of a run or a pretrained model")
    processes(sub)
    sub.set_defaults(takes_overrides=True)

    sub = command("eval", _eval, "Evaluate a run or a pretrained model at several depths and halting policies.")
    sub.add_argument("model", metavar="RUN|MODEL")
    sub.add_argument("--data", metavar="DIR", help="prepared rows (default: the run's own)")
    sub.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    sub.add_argument("--loops", type=_integers, metavar="1,2,4", help="depths, also 1-8 (default: the config's)")
    sub.add_argument(
        "--halting",
        type=_policies,
        action="extend",
        default=[],
        metavar="CRITERION[:T],…",
        help="let tokens stop early, at most at the largest depth: latent:0.03,latent:0.1; without T: a sweep",
    )
    sub.add_argument("--tasks", type=_words, metavar="A,B", help="lm-evaluation-harness tasks or task files (lm_eval)")
    sub.add_argument("--include-path", metavar="DIR", help="a folder with more task files")
    sub.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    sub.add_argument("--tokenizer", metavar="FILE", help='of tasks, for a model without one: tokenizer.json or "bytes"')
    sub.add_argument("--seed", type=int, default=0, help="of tasks: few-shot examples and sampling (default 0)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    processes(sub)

    sub = command("generate", _generate, "Continue a prompt.")
    sub.add_argument("model", metavar="RUN|MODEL")
    sub.add_argument("prompt")
    sub.add_argument("--tokenizer", metavar="FILE", help='for a model without one: a tokenizer.json, or "bytes"')
    sub.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    sub.add_argument("--loops", type=int, help="depth (default: the config's)")
    sub.add_argument(
        "--halting", type=_halting, metavar="CRITERION[:T]", help="let tokens stop early: act, latent:0.03, kl:5e-4, …"
    )
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest of total mass P")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--draft-loops", type=int, metavar="D", help="draft with D loops and verify at full depth: same text, sooner"
    )
    sub.add_argument("--draft-tokens", type=int, default=3, metavar="N", help="tokens a draft (default 3)")
    sub.add_argument(
        "--loop-cache-slots", type=int, metavar="N", help="bound the cache: loop t shares slot t mod N (approximate)"
    )
    sub.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="tokens of the prompt read at a time (default 512)"
    )

    sub = command(
        "predictor", _predictor, "Train the head that foresees how many loops a token needs, on a run's rows."
    )
    sub.add_argument("model", metavar="RUN")
    sub.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    sub.add_argument("--loops", type=int, help="the most loops it can foresee (default: the config's)")
    sub.add_argument("--rows", type=int, default=512, metavar="N", help="rows to record (default 512)")

    sub = command("info", _info, "Parameters, FLOPs per token by loops, cache bytes per token.")
    sub.add_argument("config", metavar="CONFIG.yaml|RUN")
    sub.add_argument(
        "--context", type=int, metavar="N", help="tokens attended to, for FLOPs (default: half of max_seq_len)"
    )
    sub.set_defaults(takes_overrides=True)

    sub = command("compile", _compile, "Compile for TPUs that are not there: does it fit, and what bounds a step?")
    sub.add_argument("config", metavar="CONFIG.yaml")
    sub.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:16x16 or v5p:4x4x8")
    sub.add_argument("--slices", type=int, default=1, metavar="N", help="slices joined by the data centre network")
    sub.add_argument("--decode", action="store_true", help="the decode step instead of the train step")
    sub.add_argument("--quick", action="store_true", help="a fifth of the compile time; speeds are rougher")
    sub.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else")
    sub.set_defaults(takes_overrides=True)

    sub = command("convert", _convert, "Write a model in another format, with a report of every tensor.")
    sub.add_argument("source", metavar="SRC", help="a run, a directory, a .safetensors, .pt or .bin file, a hub id")
    sub.add_argument("target", metavar="DST", help="a directory that does not exist yet")
    sub.add_argument("--to", required=True, metavar="FORMAT", help="openmythos, huginn, parcae or mythos_jax")
    sub.add_argument(
        "--config", metavar="FILE", help="for a file of tensors only: a config.json, or one of our YAML files"
    )
    sub.add_argument("--check", action="store_true", help="also run the original and ours on the same tokens")
    sub.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else")

    data = commands.add_parser("data", help="Prepare text for training.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    sub = command("prepare", _prepare, "Turn files, folders, JSONL and Parquet into token rows.", under=data)
    sub.add_argument("sources", nargs="+", metavar="SRC", help='a file, a folder, or "stdlib"')
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--tokenizer", default="bytes", metavar="FILE", help='a tokenizer.json (default: "bytes")')
    sub.add_argument("--seq-len", type=int, default=1024, metavar="T", help="tokens a row predicts (default 1024)")
    sub.add_argument(
        "--held-out-fraction", type=float, default=0.05, metavar="F", help="fraction of documents (default 0.05)"
    )
    sub.add_argument("--max-bytes", type=int, default=0, metavar="N", help="stop after so much text (default: all)")
    sub.add_argument("--workers", type=int, default=0, metavar="N", help="threads that tokenise (default: all cores)")
    return parser


def _integers(text: str) -> list[int]:
    """1,2,4 or 1-8 or both."""
    values = []
    try:
        for part in text.split(","):
            first, to, last = part.partition("-")
            values += range(int(first), int(last) + 1) if to else [int(part)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: integers >= 1 with commas between") from None
    if min(values, default=0) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: integers >= 1")
    return values


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _policies(text: str) -> list[Any]:
    return [_halting(word) for word in text.split(",")]


def _halting(text: str):
    from mythos_jax.model.halting import Halting

    criterion, _, threshold = text.partition(":")
    try:
        number = float(threshold) if threshold else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: CRITERION:THRESHOLD, such as latent:0.03") from None
    try:
        return Halting(criterion, number)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _connect(arguments: argparse.Namespace) -> None:
    """Joins the other processes of this command, if there are any, and sets up the compilation cache."""
    from mythos_jax.cluster import cache_compilations, connect, find_cluster

    cache_compilations(arguments.compilation_cache)
    cluster = find_cluster(os.environ, arguments.coordinator, arguments.processes, arguments.process_id)
    connect(cluster, arguments.connect_timeout, arguments.heartbeat_timeout)


@contextlib.contextmanager
def _restart_on_sigterm() -> Iterator[None]:
    """Until the training loop takes the signal over there is nothing to save, but the exit code is the same."""

    def end(*_):
        print("mythos: stopped by SIGTERM outside the training loop; the same command goes on", file=sys.stderr)
        raise SystemExit(RESTART)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread: signals are the caller's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from mythos_jax.config import load_config
    from mythos_jax.paths import to_path
    from mythos_jax.processes import is_process_zero
    from mythos_jax.runs.checkpoints import quiet_background_errors
    from mythos_jax.training.train import train

    if not arguments.debug:
        quiet_background_errors()
    config = load_config(arguments.config, overrides)
    with _restart_on_sigterm():
        _connect(arguments)
        workdir = to_path(arguments.workdir or Path("runs") / config.name)
        last = train(config, workdir, init_from=arguments.init_from)
    if not is_process_zero():
        return
    print(f"trained to step {last['step']}, loss {last['loss']:.4f} nats per token")
    print(f"checkpoints: {workdir / 'checkpoints'}\nlog: {workdir / 'metrics.jsonl'}")


def _eval(arguments: argparse.Namespace, _: list[str]) -> None:
    from mythos_jax.evaluation.evaluate import evaluate_model, evaluate_on_tasks
    from mythos_jax.evaluation.results import as_json
    from mythos_jax.processes import is_process_zero
    from mythos_jax.report.page import write_report
    from mythos_jax.report.tables import format_table
    from mythos_jax.runs.load import load_model

    _connect(arguments)
    loaded = load_model(arguments.model, arguments.step)
    common = {
        "loops": arguments.loops,
        "halting": arguments.halting,
        "progress": not arguments.json and is_process_zero(),
    }
    if arguments.tasks:
        evaluation = evaluate_on_tasks(
            loaded,
            arguments.tasks,
            include_path=arguments.include_path,
            tokenizer=arguments.tokenizer,
            limit=arguments.limit,
            seed=arguments.seed,
            **common,
        )
    else:
        evaluation = evaluate_model(loaded, data=arguments.data, look_inside=True, **common)
    if not is_process_zero():
        return
    # A pretrained model may lie in a cache that is not ours to write to.
    folder = Path("reports") / loaded.config.name if loaded.step is None else loaded.directory / "report"
    numbers, page = write_report(folder, evaluation, command=arguments.command_line)
    if arguments.json:
        print(json.dumps(as_json(evaluation)))
        return
    print(format_table(evaluation.results))
    print(f"report: {page}, {numbers}")


def _generate(arguments: argparse.Namespace, _: list[str]) -> None:
    from mythos_jax.inference.text import tell
    from mythos_jax.runs.load import load_model

    keywords = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    if arguments.draft_loops is not None:
        for name, value in [("temperature", arguments.temperature), ("loop-cache-slots", arguments.loop_cache_slots)]:
            if value:
                raise ConfigError(
                    f"--{name}: got {value}, allowed without --draft-loops (greedy, a slot for each loop)"
                )
        keywords = {"draft_loops": arguments.draft_loops, "draft_tokens": arguments.draft_tokens}
    pieces, spent = tell(
        load_model(arguments.model, arguments.step),
        arguments.prompt,
        arguments.tokenizer,
        loops=arguments.loops,
        halting=arguments.halting,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        loop_cache_slots=arguments.loop_cache_slots,
        prefill_chunk=arguments.prefill_chunk,
        **keywords,
    )
    print(arguments.prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:  # also where Ctrl-C ends the text
        print(flush=True)
    print(f"mythos: {spent}", file=sys.stderr)


def _predictor(arguments: argparse.Namespace, _: list[str]) -> None:
    from mythos_jax.runs.load import load_model
    from mythos_jax.training.predictor import make_predictor

    loaded = load_model(arguments.model, arguments.step)
    about = make_predictor(loaded, loops=arguments.loops, rows=arguments.rows)
    print(f"{'mean loops':>10} {'KL to the final, nats':>22}")
    for loops, excess in zip(about["mean_loops"], about["excess_nats"], strict=True):
        print(f"{loops:>10.2f} {excess:>22.5f}")
    print(f"predictor: {loaded.directory / 'predictor'}; its own budget is {about['budget']:.2f} loops")


def _info(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from mythos_jax.config import load_config, load_run_config
    from mythos_jax.info import describe

    path = Path(arguments.config)
    if path.suffix in (".yaml", ".yml") or (path / "config.yaml").is_file():
        is_run = path.is_dir()
        config = load_run_config(path / "config.yaml", overrides) if is_run else load_config(path, overrides)
        name, model = config.name, config.model
    else:
        from mythos_jax.porting.reading import FileSource

        source = FileSource(arguments.config)
        name, model = source.path.stem, source.config
    print(describe(name, model, arguments.context))


def _compile(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.preflight.topology import parse_topology

    topology = parse_topology(arguments.topology, arguments.slices)
    # Before jax starts: no TPU is looked for, and if there is one it is not taken from those who train on it.
    # A program for a device that is not there cannot come from the cache either.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    from mythos_jax.config import load_config
    from mythos_jax.preflight.report import as_json, as_text, preflight

    config = load_config(arguments.config, overrides)
    report = preflight(config, topology, decode=arguments.decode, quick=arguments.quick)
    print(json.dumps(as_json(report)) if arguments.json else as_text(report))
    return 0 if report.fits else FAILED


def _convert(arguments: argparse.Namespace, _: list[str]) -> int:
    from mythos_jax.porting.convert import convert, format_report, report_as_json
    from mythos_jax.runs.load import open_source

    report = convert(
        open_source(arguments.source, arguments.config),
        arguments.target,
        arguments.to,
        check=arguments.check,
        progress=not arguments.json,
    )
    print(json.dumps(report_as_json(report)) if arguments.json else format_report(report))
    if report.coverage.problems:
        return WRONG_INPUT
    return 0 if report.ok else FAILED


def _prepare(arguments: argparse.Namespace, _: list[str]) -> None:
    from mythos_jax.data.prepare import prepare

    manifest = prepare(
        arguments.sources,
        arguments.out,
        tokenizer=arguments.tokenizer,
        seq_len=arguments.seq_len,
        held_out_fraction=arguments.held_out_fraction,
        max_bytes=arguments.max_bytes,
        workers=arguments.workers,
    )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.rows:,} rows, {split.tokens:,} tokens, {split.documents:,} documents")
    print(f"prepared: {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
