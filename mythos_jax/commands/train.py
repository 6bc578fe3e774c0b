"""`mythos train`."""

import argparse
import contextlib
import faulthandler
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from mythos_jax.bounds import Between
from mythos_jax.commands.arguments import add_processes, connect, of_type, path
from mythos_jax.errors import DONE, RESTART, ConfigError
from mythos_jax.interrupts import handled
from mythos_jax.streams import print_result, say

if TYPE_CHECKING:
    from mythos_jax.training.loggers import Logger

SUMMARY = "Train a model, or resume a run. Any config field can be set: --section.field value."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=path, metavar="CONFIG", help="a YAML file, or the name of a config of the package: quickstart, …"
    )
    parser.add_argument("--workdir", type=path, metavar="DIR", help="the run directory (default runs/NAME)")
    parser.add_argument(
        "--init-from",
        type=path,
        metavar="MODEL",
        help="start from the weights of a run or of a pretrained model; the same as --training.init_from MODEL",
    )
    parser.add_argument(
        "--profiler-port",
        type=of_type(Annotated[int, Between(1024, 65535)]),
        metavar="PORT",
        help="run jax's profiler server in process i at PORT + i, for traces on request; it listens on all addresses "
        "(default: no server)",
    )
    parser.add_argument(
        "--metrics-port",
        type=of_type(Annotated[int, Between(0, 65535)]),
        metavar="PORT",
        help="process 0 serves the newest line of the log as OpenMetrics, for Prometheus; 0: a free port, which is "
        "printed (default: nothing listens)",
    )
    parser.add_argument(
        "--metrics-host",
        default="127.0.0.1",
        metavar="HOST",
        help="its address (default 127.0.0.1: this machine alone)",
    )
    add_processes(parser)
    parser.set_defaults(takes_overrides=True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.paths import to_path
    from mythos_jax.processes import is_process_zero
    from mythos_jax.runs.configs import load_config
    from mythos_jax.runs.orbax_threads import quiet_background_errors
    from mythos_jax.training.profile import start_profiler_server
    from mythos_jax.training.train import train

    if not arguments.debug:
        quiet_background_errors()
    if arguments.init_from:
        overrides = [*overrides, "--training.init_from", arguments.init_from]

    def workdir_of(name: str) -> Any:
        return to_path(arguments.workdir or Path("runs") / name)

    with _restart_on_signals(), contextlib.ExitStack() as stack:
        _show_stacks_on_request()
        connect(arguments)  # first, because to read a model asks jax for devices
        if arguments.profiler_port is not None:
            start_profiler_server(arguments.profiler_port)
        config = load_config(arguments.config, overrides, workdir_of)
        workdir = workdir_of(config.name)
        more: list[Logger] = []
        if arguments.metrics_port is not None and is_process_zero():
            more.append(stack.enter_context(_exported(config.name, arguments)))
        last = train(config, workdir, more_loggers=more)
    if is_process_zero():
        print_result(_summary(last))
        print_result(f"checkpoints: {workdir / 'checkpoints'}\nlog: {workdir / 'metrics.jsonl'}")
    return DONE


def _exported(run: str, arguments: argparse.Namespace) -> "contextlib.AbstractContextManager[Logger]":
    """Raises ConfigError if the package that it takes is not there, or the address is not free."""
    if find_spec("prometheus_client") is None:
        raise ConfigError("--metrics-port: needs prometheus_client; allowed: pip install '.[serve]' in the checkout")
    from mythos_jax.training.exporter import exported

    return exported(run, arguments.metrics_host, arguments.metrics_port)


def _summary(last: dict[str, Any]) -> str:
    """The last metrics in words. A finished run may have lost them, or may have no loss to show."""
    loss, skipped = last.get("loss"), last.get("skipped", 0)
    words = f"trained to step {last['step']}" + ("" if loss is None else f", loss {loss:.4f} nats per token")
    return words + (f"; {skipped} updates were skipped" if skipped else "")


def _show_stacks_on_request() -> None:
    """SIGUSR1 prints what each thread of Python is doing, for a run that seems to hang; the run goes on."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # standard error is no file
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


@contextlib.contextmanager
def _restart_on_signals() -> Iterator[None]:
    """Ends with exit code 42 on SIGTERM and SIGHUP before and after the training loop, which handles them itself."""

    def end(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        say(f"mythos: stopped by {name} outside the training loop; run the same command to resume")
        raise SystemExit(RESTART)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        numbers.append(signal.SIGHUP)
    with handled(numbers, end):
        yield
