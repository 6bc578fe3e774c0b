"""`mythos`: finds the command, runs it, and turns errors into one line and an exit code.

Each command is a module of `commands/` with `SUMMARY`, `add_arguments(parser)` and `run(arguments, overrides)`, which
returns the exit code. Exit codes: 0 done, 1 failed, 2 wrong input, 42 run the same command again (SIGTERM or SIGHUP
stopped it after a checkpoint, or another process of the run was lost), 130 stopped by Ctrl-C, 141 nobody reads standard
output any more (`mythos info RUN | head -1`).
"""

import argparse
import difflib
import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from mythos_jax import interrupts
from mythos_jax.commands import (
    chat,
    compile,
    convert,
    data,
    eval,
    generate,
    info,
    launch,
    retrofit,
    serve,
    train,
    train_predictor,
    watch,
)
from mythos_jax.commands.words import find_parser, split_overrides
from mythos_jax.errors import (
    CLOSED_PIPE,
    FAILED,
    INTERRUPTED,
    RESTART,
    WRONG_INPUT,
    ConfigError,
    Interrupted,
    StorageError,
    TrainingError,
    one_line,
)
from mythos_jax.streams import discard, replace_closed, say
from mythos_jax.version import __version__

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "eval": eval,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "watch": watch,
    "train-predictor": train_predictor,
    "info": info,
    "compile": compile,
    "launch": launch,
    "convert": convert,
    "retrofit": retrofit,
    "data": data,
}
RENAMED = {"predictor": "train-predictor"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors a user can cause become one line on standard error."""
    replace_closed()
    argv = sys.argv[1:] if argv is None else list(argv)
    if hasattr(sys.stdout, "reconfigure"):
        # Where the locale has no such character: its escape, rather than no output.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run_command(argv)
        finally:
            _flush()
    except _OutputLost as lost:
        if isinstance(lost.__cause__, BrokenPipeError):
            return CLOSED_PIPE
        _say(f"standard output: {lost.__cause__}")
        return FAILED


def _run_command(argv: list[str]) -> int:
    if problem := _unknown_command(argv):
        return _wrong_input(problem)
    parser = build_parser()
    words, overrides, problem = split_overrides(find_parser(parser, argv), argv)
    if problem:
        return _wrong_input(problem)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        return _wrong_input(f"unknown argument {unknown[0]!r} for `mythos {arguments.command}`; see its --help")
    arguments.command_line = shlex.join(["mythos", *argv])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides what XLA logs when it starts
    with interrupts.caught() as pressed:
        try:
            if overrides and arguments.takes_overrides is not True:
                _check_sections(overrides, arguments.takes_overrides)
            return COMMANDS[arguments.command].run(arguments, overrides)
        except KeyboardInterrupt:
            return _interrupted()
        except Exception as error:
            error = _as_wrong_input(error)
            code = _exit_code(error)
            if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
                raise _OutputLost from error
            if pressed and code is None:  # code in C turns an interrupt into an error of its own
                return _interrupted()
            if "jax" in sys.modules:
                return _end_together(error, code, arguments.debug)
            if arguments.debug or code is None:
                raise
            _say(_line(error))
            return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their flags."""
    parser = _Parser(prog="mythos", description="Recurrent-depth transformers in JAX.")
    parser.add_argument("--version", action="version", version=f"mythos {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY, allow_abbrev=False)
        sub.set_defaults(takes_overrides=False)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(sub)
    return parser


def _check_sections(overrides: list[str], sections: tuple[str, ...]) -> None:
    """Raises ConfigError if a field is set that is not in one of the sections that the command allows for a run."""
    from mythos_jax.config.overrides import override_names

    for name in override_names(overrides):
        if name.partition(".")[0] not in sections:
            allowed = " and ".join(f"--{section}.FIELD" for section in sections)
            raise ConfigError(f"--{name}: fixed by the run; allowed: {allowed}")


class _Parser(argparse.ArgumentParser):
    """A parser, and through `add_parser` those of the commands, whose errors are one line as all others are."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_wrong_input(f"{message}; see `{self.prog} --help`"))


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
    _say(message)
    return WRONG_INPUT


def _interrupted() -> int:
    _say("interrupted")
    return INTERRUPTED


def _say(message: str) -> None:
    """One line on standard error."""
    say(f"mythos: {' '.join(message.splitlines())}")


class _OutputLost(Exception):
    """Standard output cannot be written, because of the error that is its cause."""


def _nobody_reads(stream: Any) -> bool:
    """Whether this is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _flush() -> None:
    """Raises _OutputLost if that fails. What is written later then goes nowhere: Python flushes again when it ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        raise _OutputLost from error


def _as_wrong_input(error: Exception) -> Exception:
    """The error as one of the user's, if it is Python's about a name that the locale cannot spell, or jax's about a
    platform that is not there; else unchanged."""
    if isinstance(error, UnicodeEncodeError):
        allowed = f"characters of the locale, whose encoding is {error.encoding}; LC_ALL=C.UTF-8 has all"
        return ConfigError(f"{error.object!r}: cannot be a name here; allowed: {allowed}")
    reason = one_line(error, limit=200)
    if isinstance(error, AssertionError) and not reason and "jax" in sys.modules:  # jax's answer for cuda
        try:
            sys.modules["jax"].devices()
        except AssertionError:
            reason = "Unable to initialize backend"
    if not reason.startswith("Unable to initialize backend"):
        return error
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return ConfigError(f"JAX_PLATFORMS: got {platforms!r}, allowed: a platform that this machine has ({reason})")


def _line(error: Exception) -> str:
    """The message of an expected error. Python's own begin with a number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _exit_code(error: Exception) -> int | None:
    """The exit code of an expected error; None for a bug."""
    if isinstance(error, ConfigError):
        return WRONG_INPUT
    if isinstance(error, Interrupted):
        return INTERRUPTED if error.signal == signal.SIGINT else RESTART
    if isinstance(error, StorageError):
        return RESTART
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
        _say(f"{process_prefix()}{_line(error)}")
    code = FAILED if code is None else code
    if not stopped:
        exit_now(code)
    return code
