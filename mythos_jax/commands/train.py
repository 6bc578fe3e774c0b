"""`mythos train`."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from mythos_jax.commands.arguments import add_processes, connect
from mythos_jax.errors import DONE, RESTART

SUMMARY = "Train a model, or resume a run. Any config field can be set: --section.field value."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("--workdir", metavar="DIR", help="the run directory (default runs/NAME)")
    parser.add_argument("--init-from", metavar="MODEL", help="start from the weights of a run or of a pretrained model")
    add_processes(parser)
    parser.set_defaults(takes_overrides=True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.config import load_config
    from mythos_jax.paths import to_path
    from mythos_jax.processes import is_process_zero
    from mythos_jax.runs.checkpoints import quiet_background_errors
    from mythos_jax.training.train import train

    if not arguments.debug:
        quiet_background_errors()
    config = load_config(arguments.config, overrides)
    with _restart_on_sigterm():
        connect(arguments)
        workdir = to_path(arguments.workdir or Path("runs") / config.name)
        last = train(config, workdir, init_from=arguments.init_from)
    if is_process_zero():
        print(f"trained to step {last['step']}, loss {last['loss']:.4f} nats per token")
        print(f"checkpoints: {workdir / 'checkpoints'}\nlog: {workdir / 'metrics.jsonl'}")
    return DONE


@contextlib.contextmanager
def _restart_on_sigterm() -> Iterator[None]:
    """Ends with exit code 42 on SIGTERM before and after the training loop, which handles the signal itself."""

    def end(_: int, frame: FrameType | None) -> None:
        print("mythos: stopped by SIGTERM outside the training loop; run the same command to resume", file=sys.stderr)
        raise SystemExit(RESTART)

    try:
        previous = signal.signal(signal.SIGTERM, end)
    except ValueError:  # outside the main thread signals are left to the caller
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
