"""Watched runs as a self-contained HTML page, with the drawing of the reports of `mythos eval`."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Literal

from mythos_jax.report.html import charts, document, pair, section, share_table, table, tiles
from mythos_jax.report.svg import Axis, Series, line_chart
from mythos_jax.watch import words
from mythos_jax.watch.comparison import compare_losses
from mythos_jax.watch.history import Curve
from mythos_jax.watch.reading import WatchedRun
from mythos_jax.watch.summary import Summary, clock, duration, lost_steps, names, steady, summarise_all

Refresh = Literal["file", "served"] | None

_RATES = ("tokens_per_second", "mfu", "data_wait")
_MOST_POINTS = 200  # of a line; more are averaged
_MOST_EVENTS = 50  # rows of the table of events

# Exchanges what the page shows for what the server says now; if that has ended, the page stays and says so.
_SCRIPT = """<script>
const look = async () => {
  const scrolled = [...document.querySelectorAll(".scroll")].map((e) => [e.scrollLeft, e.scrollTop]);
  const facts = document.querySelector(".facts");
  try {
    const text = await (await fetch(location.href)).text();
    const fresh = new DOMParser().parseFromString(text, "text/html");
    document.title = fresh.title;
    for (const tag of ["header", "main", "footer"]) {
      document.querySelector(tag).replaceWith(fresh.querySelector(tag));
    }
    document.querySelectorAll(".scroll").forEach((e, i) => scrolled[i] && e.scrollTo(...scrolled[i]));
  } catch {
    if (!facts.querySelector(".gone")) {
      facts.insertAdjacentHTML("beforeend", "<li class=gone>mythos watch has ended: this is what it saw last</li>");
    }
  }
  setTimeout(look, EVERY);
};
setTimeout(look, EVERY);
</script>"""


def render_page(runs: Sequence[WatchedRun], command: str, every: float, refresh: Refresh) -> str:
    """command: what makes the page, for display. every: seconds. refresh: how a browser that shows it gets the next."""
    summaries = summarise_all(runs)
    facts = [f"looked at {clock(max(run.looked for run in runs))}"]
    head = '<link rel="icon" href="data:,">'
    if refresh is not None:
        facts.append(f"again every {every:g} s")
        served = _SCRIPT.replace("EVERY", json.dumps(round(1000 * every)))
        head += served if refresh == "served" else f'<meta http-equiv="refresh" content="{math.ceil(every)}">'
    sections = [_overview(summaries), _losses(runs, summaries), _curves(runs, summaries), _times(summaries)]
    sections += [_events(runs), _experts(runs)]
    title = ", ".join(summary.name for summary in summaries)
    footer = "Made by mythos_jax from the run directory alone."
    return document(f"{title}: training", facts, command, [part for part in sections if part], footer, head)


def _overview(summaries: Sequence[Summary]) -> str:
    columns = {"run": [s.name for s in summaries], "state": [words.state(s) for s in summaries]}
    columns |= {name: [text(s) for s in summaries] for name, text in words.NUMBERS.items()}
    if len(summaries) > 1:
        columns["step time"] = [words.step_time(s, brief=True) for s in summaries]
    known = {name: cells for name, cells in columns.items() if any(cell != words.NONE for cell in cells)}
    said = " ".join(f"{s.name}: {words.details(s)}." for s in summaries if words.details(s))
    if len(summaries) == 1:
        return section("Now", said, tiles([(name, cells[0]) for name, cells in known.items() if name != "run"]))
    rows = [[cells[i] for cells in known.values()] for i in range(len(summaries))]
    return section("Now", said, table(list(known), rows, "The runs"))


def _losses(runs: Sequence[WatchedRun], summaries: Sequence[Summary]) -> str:
    series = []
    for i, run in enumerate(runs):
        name = summaries[i].name
        series.append(_series(run.history["loss"], f"{name}: loss" if len(runs) == 1 else name, i, len(runs) == 1))
        held_out = run.history["held_out_loss"]
        if held_out:
            line = _series(held_out, f"{name}: held out", i + (len(runs) == 1), False)
            series.append(Series(line.name, line.points, line.style, dashed=True, marked=False))
    if not any(s.points for s in series):
        return section("Loss", "Nothing has been logged yet.")
    chart = _chart(series, "loss, nats per token", log=True)
    found = compare_losses(runs)
    headings, rows = ["step", *(s.name for s in summaries)], found.rows
    text, caption = f"At equal steps: {found.note}.", "Losses at equal steps"
    if len(runs) == 1:
        held_out = runs[0].history["held_out_loss"]
        before = [0, *(step for step, _ in rows)]
        rows = [(step, [*row, held_out.mean(after, step)]) for after, (step, row) in zip(before, rows, strict=False)]
        headings, text, caption = ["step", "loss", "held out"], f"In the table: {found.note}.", "Losses"
    cells = [[f"{step:,}", *(words.NONE if x is None else f"{x:.4f}" for x in row)] for step, row in rows]
    numbers = table(headings, cells, caption) if cells else ""
    return section("Loss", f"{text} The chart's axis is logarithmic.", pair(chart, numbers))


def _curves(runs: Sequence[WatchedRun], summaries: Sequence[Summary]) -> str:
    """Everything else that changes over the steps, as far as it is logged."""
    found = []
    for name, label in [
        ("mean_loops", "loops per token"),
        ("tokens_per_second", "tokens per second"),
        ("mfu", "MFU"),
        ("step_seconds_p50", "median seconds per step"),
        ("data_wait", "data wait, seconds per step"),
        ("hbm_peak_bytes", "peak HBM, bytes"),
        ("load_imbalance", "busiest expert, times even"),
        ("gradient_norm", "gradient norm"),
    ]:
        series = [
            _series(steady(run, name) if name in _RATES else run.history[name], summaries[i].name, i, False)
            for i, run in enumerate(runs)
        ]
        shown = [line for line in series if len(line.points) > 1]
        if shown:
            found.append(_chart(shown, label))
    return section("Depth and speed", "", charts(found)) if found else ""


def _times(summaries: Sequence[Summary]) -> str:
    known = [(s, s.times) for s in summaries if s.times is not None and s.times.total]
    if not known:
        return ""

    def share(seconds: float, total: float) -> str:
        return f"{duration(seconds)} ({seconds / total:.1%})"

    rows = [
        [s.name, duration(t.total), *(share(part, t.total) for part in (t.counted, t.lost, t.down, t.rest))]
        for s, t in known
    ]
    text = (
        "Goodput is the share of the time since the first start in which steps were computed that still count. Steps "
        "are lost when a run resumes from a checkpoint before them; the rest is compiling, waiting for data, "
        "evaluating and saving."
    )
    headings = ["run", "since the first start", "steps that count: goodput", "steps lost", "not running", "the rest"]
    return section("Where the time went", text, table(headings, rows, "Where the time went"))


def _events(runs: Sequence[WatchedRun]) -> str:
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        for event in run.events:
            rows.append((event["time"], [name, clock(event["time"]), *_event_words(event)]))
    if not rows:
        return ""
    rows.sort(key=lambda row: row[0], reverse=True)
    text = "Newest first." + (f" The newest {_MOST_EVENTS} of {len(rows)}." if len(rows) > _MOST_EVENTS else "")
    shown = [cells for _, cells in rows[:_MOST_EVENTS]]
    return section("Starts and ends", text, table(["run", "when", "what", "step", "how"], shown, "Starts and ends"))


def _event_words(event: dict[str, object]) -> list[str]:
    step = event.get("step")
    at = f"{step:,}" if isinstance(step, int) else words.NONE
    if event["event"] == "start" and isinstance(step, int):
        lost = lost_steps(event)
        again = f", {lost:,} logged steps again" if lost else ""
        where = f"{event.get('devices')} {event.get('device_kind')} on {event.get('host')}"
        return ["restart" if step else "start", at, f"{where}{again}"]
    how = ", ".join(str(event[name]) for name in ("how", "message") if event.get(name))
    return [str(event["event"]), at, how or words.NONE]


def _experts(runs: Sequence[WatchedRun]) -> str:
    tables = []
    for name, run in zip(names(runs), runs, strict=True):
        load = run.history.expert_load
        if load:
            even_rows = [row for row in load if len(row) == len(load[0])]
            highest = max(max(map(max, even_rows)), 1e-9)
            rows = [(f"layer {i}", row) for i, row in enumerate(even_rows, start=1)]
            heading = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
            tables.append(heading + share_table(rows, "layer", highest, f"{name}: load of the experts"))
    text = "The share of each layer's choices that an expert gets, in the last line of the log."
    return section("Expert load", text, *tables) if tables else ""


def _series(curve: Curve, name: str, style: int, with_band: bool) -> Series:
    """At most `_MOST_POINTS` points, each the mean of its part of the curve. with_band: its least and most as well."""
    size = max(math.ceil(len(curve) / _MOST_POINTS), 1)
    points, band = [], []
    for start in range(0, len(curve), size):
        values = [value for value in curve.values[start : start + size] if math.isfinite(value)]
        if values:
            step = curve.steps[min(start + size, len(curve)) - 1]
            points.append((float(step), sum(values) / len(values)))
            band.append((float(step), min(values), max(values)))
    shaded = with_band and size > 1
    return Series(
        f"{name}; shaded: least and most" if shaded else name,
        points,
        style,
        band=band if shaded else (),
        marked=False,
    )


def _chart(series: Sequence[Series], label: str, log: bool = False) -> str:
    ends = "; ".join(f"{s.name} {s.points[-1][1]:.4g} at step {s.points[-1][0]:,.0f}" for s in series if s.points)
    x, y = Axis("step", text="{:,.0f}".format), Axis(label, log=log, text=words.plain)
    return line_chart(series, x, y, alt=f"{label}: {ends}.")
