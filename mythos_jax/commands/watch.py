"""`mythos watch`."""

import argparse
import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from mythos_jax import interrupts
from mythos_jax.bounds import Between
from mythos_jax.commands.arguments import add_json, of_type, path
from mythos_jax.errors import DONE, ConfigError
from mythos_jax.streams import print_result

if TYPE_CHECKING:
    from rich.console import Console

    from mythos_jax.watch.reading import WatchedRun

SUMMARY = "Watch runs while they train, or look back at them: in the terminal, or as a page."

_PIPE_WIDTH = 120  # where there is no terminal that has one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run directories, also gs://…")
    parser.add_argument(
        "--once",
        action="store_true",
        help="look once and end; the view in the terminal does so where standard output is no terminal",
    )
    add_json(parser)
    parser.add_argument(
        "--html",
        type=path,
        metavar="FILE",
        help="write a page instead, and again after each look unless --once is given",
    )
    parser.add_argument(
        "--port",
        type=of_type(Annotated[int, Between(0, 65535)]),
        metavar="N",
        help="serve the page instead, to this machine alone; 0: a free port, which is printed",
    )
    parser.add_argument(
        "--every",
        type=of_type(Annotated[float, Between(0.2, 86400)]),
        default=5.0,
        metavar="S",
        help="seconds between two looks (default 5)",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    _check(arguments)
    from mythos_jax.watch.reading import WatchedRun

    runs = [WatchedRun(name) for name in arguments.runs]
    if arguments.json:
        print(_as_json(runs))
    elif arguments.port is not None:
        _serve(runs, arguments)
    elif arguments.html is not None:
        _write_pages(runs, arguments)
    else:
        _show(runs, arguments)
    return DONE


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together."""
    asked = {"--json": arguments.json, "--html": arguments.html is not None, "--port": arguments.port is not None}
    given = [name for name, is_given in asked.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"{given[1]}: got it with {given[0]}, allowed: one of {', '.join(asked)}")
    if arguments.once and asked["--port"]:
        raise ConfigError("--once: got it with --port, allowed: --once --html FILE for a page that stays as it is")


def _as_json(runs: Sequence["WatchedRun"]) -> str:
    from mythos_jax.watch.comparison import compare_losses
    from mythos_jax.watch.summary import summarise_all

    found: dict[str, Any] = {"runs": [summary.to_json() for summary in summarise_all(runs)]}
    if len(runs) > 1:
        found["losses_at_equal_steps"] = [
            {"step": step, "losses": losses} for step, losses in compare_losses(runs).rows
        ]
    return json.dumps(found, indent=2, allow_nan=False)


def _show(runs: Sequence["WatchedRun"], arguments: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console()
    if arguments.once or not console.is_terminal or console.is_dumb_terminal:
        print(_text(runs, console), end="")
        return
    from rich.live import Live

    from mythos_jax.watch.terminal import view

    # On a screen of its own, which gives back what was there before.
    with _until_told() as told, Live(console=console, screen=True, auto_refresh=False) as live:
        while not told:
            live.update(view(runs, console.width, console.height - 2), refresh=True)
            if not _wait(told, arguments.every, console):
                _look(runs)
    print(_text(runs, console), end="")


def _text(runs: Sequence["WatchedRun"], console: "Console") -> str:
    """The view as it is printed when it does not change any more."""
    from mythos_jax.watch.terminal import view

    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    with console.capture() as captured:
        console.print(view(runs, console.width, None))
    return captured.get()


def _write_pages(runs: Sequence["WatchedRun"], arguments: argparse.Namespace) -> None:
    from mythos_jax.paths import to_path, write_whole
    from mythos_jax.watch.page import render_page

    file = to_path(arguments.html)
    with _until_told() as told:
        while True:
            page = render_page(runs, arguments.command_line, arguments.every, None if arguments.once else "file")
            try:
                write_whole(file, page.encode())
            except OSError as error:
                raise ConfigError(f"--html {file}: cannot be written ({error.strerror or error})") from None
            if arguments.once:
                break
            _wait(told, arguments.every)
            if told:
                break
            _look(runs)
    print_result(f"page: {file}")


def _serve(runs: Sequence["WatchedRun"], arguments: argparse.Namespace) -> None:
    from mythos_jax.watch.page import render_page
    from mythos_jax.watch.serving import page_server

    def render() -> str:
        if time.time() - max(run.looked for run in runs) > arguments.every / 2:  # several browsers share a look
            _look(runs)
        return render_page(runs, arguments.command_line, arguments.every, "served")

    with page_server(arguments.port, render) as server, _until_told() as told:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        print_result(f"http://127.0.0.1:{server.server_port}/")
        _wait(told, float("inf"))
        server.shutdown()


def _look(runs: Sequence["WatchedRun"]) -> None:
    for run in runs:
        run.look()


def _wait(told: list[int], seconds: float, console: "Console | None" = None) -> bool:
    """Until it is time to look again, a signal says to end, or the terminal gets another size. Returns whether the last
    ended it."""
    end, size = time.monotonic() + seconds, console and console.size
    while not told and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, interrupts.TURN))
        if console is not None and console.size != size:
            return True
    return False


@contextlib.contextmanager
def _until_told() -> Iterator[list[int]]:
    """Yields a list that is not empty once Ctrl-C, SIGTERM or a closed terminal says to end, which is how watching ends
    and no failure."""
    ends = [signal.SIGTERM, signal.SIGHUP]
    with interrupts.noted() as told, interrupts.handled(ends, lambda number, _: told.append(number)):
        yield told
