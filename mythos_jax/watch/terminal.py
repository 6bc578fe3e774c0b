"""Watched runs in a terminal: a view that fits its size."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mythos_jax.watch import words
from mythos_jax.watch.comparison import compare_losses
from mythos_jax.watch.plot import COLOURS, Plotted, plot, sparkline
from mythos_jax.watch.reading import WatchedRun
from mythos_jax.watch.summary import Summary, steady, summarise_all

_STATES = {
    "starting": "yellow",
    "training": "green",
    "silent": "bold yellow",
    "lost": "bold red",
    "finished": "green",
    "stopped": "yellow",
    "failed": "bold red",
    "ended": "yellow",
}
_MOST_EXPERTS = 64  # bars; more are averaged
_LEAST_CHART, _MOST_CHART = 5, 16  # lines
_GAP = 2  # between columns of a table
# Of the table of several runs: names that are shorter than on the page, and what only the page has room for.
_SHORT = {"time left": "left", "held-out loss": "held out", "steps lost": "lost"}
_LEFT_OUT = {"model FLOPs", "step time", "data wait", "HBM", "skipped"}
# Columns of the table of several runs in the order in which they are left out of a narrow terminal.
_LESS_TELLING = ("lost", "held out", "left", "restarts", "MFU", "tokens/s", "loops", "goodput")


def view(runs: Sequence[WatchedRun], width: int, height: int | None) -> RenderableType:
    """height: the lines that there are; None: as many as it takes."""
    summaries = summarise_all(runs)
    above = _one(summaries[0]) if len(runs) == 1 else _several(summaries, width)
    below = _curves(runs[0], width) if len(runs) == 1 else _losses(runs, summaries)
    room = _MOST_CHART if height is None else height - _lines(above, width) - _lines(below, width) - 5
    chart: list[RenderableType] = []
    if room >= _LEAST_CHART:
        curves = [
            Plotted(run.history["loss"], COLOURS[i % len(COLOURS)], _mark(i) if len(runs) > 1 else "")
            for i, run in enumerate(runs)
        ]
        lines = plot(curves, width, min(room, _MOST_CHART))
        chart = [Text(), Text("loss, nats per token", style="bold"), *lines] if lines else []
    return Group(above, *chart, Text(), below) if _lines(below, width) else Group(above, *chart)


def _lines(part: RenderableType, width: int) -> int:
    from rich.console import Console

    return len(Console(width=width).render_lines(part, pad=False)) if part else 0


def _mark(index: int) -> str:
    return "123456789abcdefghijklmnopqrstuvwxyz"[index % 35]


def _state(summary: Summary) -> Text:
    return Text(words.state(summary), style=_STATES[summary.state])


def _one(summary: Summary) -> RenderableType:
    """The numbers of a run by name, two pairs in a line."""
    head = Text.assemble((summary.name, "bold"), "  ", _state(summary), f"  step {words.step(summary)}")
    if summary.seconds_left is not None:
        head.append(f"  {words.time_left(summary)} left")
    lines: list[RenderableType] = [head]
    if said := words.details(summary):
        lines.append(Text(said, style=_STATES[summary.state] if summary.detail else "yellow"))
    grid = Table.grid(padding=(0, 2))
    for _ in range(2):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
    pairs = [pair for pair in _pairs(summary) if pair[1] != words.NONE]
    for left, right in zip(pairs[::2], [*pairs[1::2], ("", "")], strict=False):
        grid.add_row(*left, *right)
    lines.append(grid)
    if went := words.where_time_went(summary):
        lines.append(Text(went, style="dim"))
    return Group(*lines)


def _pairs(s: Summary) -> list[tuple[str, str]]:
    lost = f", {s.lost_steps:,} steps lost" if s.lost_steps else ""
    return [
        ("loss", words.number(s, "loss", ".4f")),
        ("held out", words.number(s, "held_out_loss", ".4f")),
        ("depth", words.number(s, "mean_loops", ".2f", " loops")),
        ("step time", words.step_time(s)),
        ("tokens/s", words.number(s, "tokens_per_second", ",.0f")),
        ("data wait", words.data_wait(s)),
        ("FLOPs", words.flops(s)),
        ("MFU", words.number(s, "mfu", ".1f", " %", 100)),
        ("HBM", words.memory(s)),
        ("goodput", words.goodput(s)),
        ("restarts", words.restarts(s) + lost if s.restarts is not None else words.NONE),
        ("imbalance", words.number(s, "load_imbalance", ".2f", " times even")),
        ("skipped", words.number(s, "skipped", ".0f", " updates") if s.values.get("skipped") else words.NONE),
    ]


def _several(summaries: Sequence[Summary], width: int) -> RenderableType:
    """A line for each run; columns that no run has a number for are left out, and those that there is no room for."""
    columns: dict[str, Sequence[str | Text]] = {"state": [_state(s) for s in summaries]}
    columns |= {_SHORT.get(name, name): [text(s) for s in summaries] for name, text in words.NUMBERS.items()}
    columns = {name: cells for name, cells in columns.items() if name not in _LEFT_OUT}
    shown = {name: cells for name, cells in columns.items() if any(str(cell) != words.NONE for cell in cells)}
    longest = max(len(summary.name) for summary in summaries) + 2  # with the number before it
    for name in _LESS_TELLING:
        if sum(max(len(title), *map(len, cells)) + _GAP for title, cells in shown.items()) > width - longest - _GAP:
            shown.pop(name, None)
    table = _table("run", *shown, words=("run", "state"))
    for i, summary in enumerate(summaries):
        table.add_row(_numbered(i, summary.name), *(cells[i] for cells in shown.values()))
    said = [Text(f"{s.name}: {words.details(s)}", style="yellow") for s in summaries if words.details(s)]
    return Group(table, *said)


def _losses(runs: Sequence[WatchedRun], summaries: Sequence[Summary]) -> RenderableType:
    """The losses of several runs at equal steps."""
    found = compare_losses(runs)
    if not found.rows:
        return Text()
    table = _table("step", *("" for _ in runs))
    for i, column in enumerate(table.columns[1:]):
        column.header = _numbered(i, summaries[i].name)
    for step, losses in found.rows:
        best = min((loss for loss in losses if loss is not None), default=None)
        cells = [
            Text(words.NONE if loss is None else f"{loss:.4f}", style="bold" if loss == best else "") for loss in losses
        ]
        table.add_row(f"{step:,}", *cells)
    return Group(Text.assemble(("losses at equal steps", "bold"), (f"  {found.note}", "dim")), table)


def _curves(run: WatchedRun, width: int) -> RenderableType:
    """Other curves of a run in a line each, and how its experts are used."""
    names = {"mean_loops": "depth", "tokens_per_second": "tokens/s", "data_wait": "data wait"}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True)
    room, count = max(width - 40, 10), 0
    for name, title in names.items():
        curve = steady(run, name)
        finite = sorted(value for value in curve.values if math.isfinite(value))
        if len(finite) > 1:
            median = words.plain(finite[len(finite) // 2])
            grid.add_row(title, Text.assemble((sparkline(curve.values, room), "cyan"), f"  median {median}"))
            count += 1
    load = run.history.expert_load
    for i, shares in enumerate(load):
        name = "experts" if len(load) == 1 else f"experts, layer {i + 1}"
        even = len(shares)
        span = f"  {min(shares) * even:.2f} to {max(shares) * even:.2f} times even, of {even}"
        grid.add_row(name, Text.assemble((sparkline(shares, min(room, _MOST_EXPERTS), low=0.0), "magenta"), span))
        count += 1
    return grid if count else Text()


def _numbered(index: int, name: str) -> Text:
    return Text.assemble((_mark(index), f"bold {COLOURS[index % len(COLOURS)]}"), f" {name}")


def _table(*headings: str, words: Sequence[str] = ()) -> Table:
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="dim")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", no_wrap=True, overflow="ellipsis")
    return table
