"""`mythos`: finds the command, runs it, and turns errors into one line and an exit code.

Each command is a module of `commands/` with `SUMMARY`, `add_arguments(parser)` and `run(arguments, overrides)`, which
returns the exit code. Exit codes: 0 done, 1 failed, 2 wrong input, 42 run the same command again (SIGTERM or SIGHUP
stopped it after a checkpoint, or another process of the run was lost), 130 stopped by Ctrl-C.
"""

import argparse
import difflib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from mythos_jax.commands import compile, convert, data, eval, generate, info, train, train_predictor
from mythos_jax.errors import (
    FAILED,
    INTERRUPTED,
    RESTART,
    WRONG_INPUT,
    ConfigError,
    Interrupted,
    TrainingError,
    one_line,
)
from mythos_jax.streams import replace_closed, say
from mythos_jax.version import __version__

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "eval": eval,
    "generate": generate,
    "train-predictor": train_predictor,
    "info": info,
    "compile": compile,
    "convert": convert,
    "data": data,
}
RENAMED = {"predictor": "train-predictor"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors a user can cause become one line on standard error."""
    replace_closed()
    argv = sys.argv[1:] if argv is None else list(argv)
    if problem := _unknown_command(argv):
        return _wrong_input(problem)
    arguments, overrides = build_parser().parse_known_args(argv)
    arguments.command_line = shlex.join(["mythos", *argv])
    if overrides and not arguments.takes_overrides:
        return _wrong_input(f"unknown argument {overrides[0]!r} for `mythos {arguments.command}`; see its --help")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides what XLA logs when it starts
    try:
        return COMMANDS[arguments.command].run(arguments, overrides)
    except KeyboardInterrupt:
        say("mythos: interrupted")
        return INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        if "jax" in sys.modules:
            return _end_together(error, code, arguments.debug)
        if arguments.debug or code is None:
            raise
        say(f"mythos: {error}")
        return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their flags."""
    parser = argparse.ArgumentParser(prog="mythos", description="Recurrent-depth transformers in JAX.")
    parser.add_argument("--version", action="version", version=f"mythos {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY, allow_abbrev=False)
        sub.set_defaults(takes_overrides=False)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(sub)
    return parser


def _unknown_command(argv: list[str]) -> str:
    """What is wrong with the first word; empty if it is a command or a flag."""
    if not argv or argv[0].startswith("-") or argv[0] in COMMANDS:
        return ""
    if argv[0] in RENAMED:
        return f"`mythos {argv[0]}` is now `mythos {RENAMED[argv[0]]}`"
    close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(COMMANDS)}"
    return f"unknown command {argv[0]!r}; {hint}"


def _wrong_input(message: str) -> int:
    say(f"mythos: {message}")
    return WRONG_INPUT


def _exit_code(error: Exception) -> int | None:
    """The exit code of an expected error; None for a bug."""
    if isinstance(error, ConfigError):
        return WRONG_INPUT
    if isinstance(error, Interrupted):
        return INTERRUPTED if error.signal == signal.SIGINT else RESTART
    return FAILED if isinstance(error, TrainingError | OSError) else None


def _end_together(error: Exception, code: int | None, debug: bool) -> int:
    """Ends with an error where there may be several processes: none may wait for others that are waiting for it."""
    from mythos_jax.processes import exit_now, is_process_zero, is_single_process, lost_a_process, process_prefix

    if lost_a_process(error):
        code, error = RESTART, RuntimeError(f"another process of this run is gone ({one_line(error, limit=200)})")
    # A signal stops all processes after the same step, so they can shut down together, and one message is enough.
    stopped = isinstance(error, Interrupted)
    if is_single_process() and (debug or code is None):
        raise error
    if debug or code is None:
        traceback.print_exception(error)
    elif is_process_zero() or not stopped:
        say(f"mythos: {process_prefix()}{error}")
    code = FAILED if code is None else code
    if not stopped:
        exit_now(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
