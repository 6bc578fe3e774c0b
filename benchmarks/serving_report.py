"""What the serving benchmark says: numbers of each side under each load, as tables, JSON and a picture."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.serving_load import Reply
from benchmarks.serving_sides import Measured
from benchmarks.timing import median_and_range, ratios

Runs = dict[str, list[Measured]]  # side -> its rounds
COLUMNS = (
    "side", "tokens/s", "ratio", "loops executed / asked", "loops per token", "first token, ms", "between tokens, ms",
    "ms per token", "places busy",
)  # fmt: skip
COLOURS = {
    "engine": "#1f5fa8", "all loops": "#c0504d", "provisional": "#e0a030", "static": "#6a6a6a",
    "static, sorted": "#b0b0b0", "transformers": "#2e8b57", "server": "#1f5fa8",
}  # fmt: skip


def throughput(run: Measured) -> float:
    return sum(reply.new_tokens for reply in run.replies) / run.seconds


def loops_of(replies: Sequence[Reply], skip: int = 0) -> int | None:
    """The loops of all new tokens but the first `skip` of each reply; None if the side does not tell."""
    loops = [n for reply in replies for n in reply.loops[skip:]]
    return None if not loops or None in loops else sum(n for n in loops if n is not None)


def latencies(runs: Iterable[Measured]) -> dict[str, list[float]]:
    """Seconds of all replies of all rounds: to the first token, to the first one shown, from a draft to its
    confirmation, between tokens, per token."""
    replies = [reply for run in runs for reply in run.replies if reply.times]
    return {
        "first": [reply.times[0] - reply.due for reply in replies],
        "shown": [reply.first_shown - reply.due for reply in replies if reply.first_shown is not None],
        "ahead": [seconds for reply in replies for seconds in reply.ahead],
        "between": [gap for reply in replies for gap in np.diff(reply.times).tolist()],
        "normalised": [(reply.ended - reply.due) / reply.new_tokens for reply in replies if reply.ended is not None],
    }


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds; 0 and 0 if there are none."""
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3 if seconds else (0.0, 0.0)
    return float(p50), float(p99)


def equal_replies(runs: Sequence[Measured], truth: Sequence[Reply]) -> int:
    """How many replies have the tokens of the offline ones, in the round in which the fewest do."""
    return min(sum(a.tokens == b.tokens for a, b in zip(run.replies, truth, strict=True)) for run in runs)


def numbers(runs: Sequence[Measured], baseline: Sequence[Measured], truth: Sequence[Reply] | None) -> dict[str, Any]:
    """What JSON and the tables show of a side. baseline: of the ratio. truth: the replies of offline generation."""
    replies = runs[0].replies if truth is None else truth
    mine: dict[str, Any] = {
        "tokens_per_second": [throughput(run) for run in runs],
        "ratio": ratios([throughput(run) for run in runs], [throughput(run) for run in baseline]),
        "seconds": [run.seconds for run in runs],
        "cpu_seconds": [run.cpu for run in runs],
        "tokens": sum(reply.new_tokens for reply in runs[0].replies),
        "loops": loops_of(replies),
        "loops_asked": loops_of(replies, skip=1),
        "loops_executed": [run.executed for run in runs],
        "places_busy": [run.executed / run.steps for run in runs if run.executed is not None and run.steps],
        **{f"{name}_ms": percentiles(seconds) for name, seconds in latencies(runs).items()},
    }
    if truth is not None:
        mine["replies"], mine["replies_equal_to_offline"] = len(truth), equal_replies(runs, truth)
    if any(run.drafted for run in runs):
        mine["drafts_accepted"] = sum(run.accepted for run in runs) / sum(run.drafted for run in runs)
    return mine


def row(side: str, mine: dict[str, Any]) -> str:
    def pair(name: str) -> str:
        p50, p99 = mine[f"{name}_ms"]
        return f"{p50:.1f} / {p99:.1f}" if p99 else ""

    asked, executed = mine["loops_asked"], mine["loops_executed"][0]
    cells = [
        side,
        median_and_range(mine["tokens_per_second"], digits=0),
        median_and_range(mine["ratio"], digits=2),
        "" if asked is None or executed is None else f"{statistics.median(mine['loops_executed']) / asked:.3f}",
        "" if mine["loops"] is None else f"{mine['loops'] / mine['tokens']:.2f}",
        pair("first"),
        pair("between"),
        pair("normalised"),
        f"{statistics.median(mine['places_busy']):.1f}" if mine["places_busy"] else "",
    ]
    return "| " + " | ".join(cells) + " |"


def table(load: str, sides: dict[str, dict[str, Any]], baseline: str) -> str:
    """Markdown: a row for each side. Latencies are p50 / p99."""
    lines = [f"**{load}**; ratio: to {baseline!r}, within each round", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += [row(side, mine) for side, mine in sides.items()]
    lines += [line for note in notes(sides) for line in ("", note)]
    return "\n".join(lines)


def notes(sides: dict[str, dict[str, Any]]) -> list[str]:
    """What the columns do not say."""
    lines = []
    for side, mine in sides.items():
        if "engine" in sides and side != "engine":
            of_time, of_cpu = (
                median_and_range(ratios(mine[name], sides["engine"][name]), digits=2)
                for name in ("seconds", "cpu_seconds")
            )
            lines.append(f"{side}: {of_time} times the engine's time, {of_cpu} times its CPU time.")
    equal = {side: mine for side, mine in sides.items() if "replies" in mine}
    if equal:
        counts = [f"{side}: {mine['replies_equal_to_offline']} of {mine['replies']}" for side, mine in equal.items()]
        lines.append(f"Replies with the tokens of offline generation: {'; '.join(counts)}.")
    for side, mine in sides.items():
        if "drafts_accepted" in mine:
            (p50, p99), accepted = mine["ahead_ms"], mine["drafts_accepted"]
            lines.append(
                f"{side}: {accepted:.0%} of drafts confirmed, which were shown {p50:.1f} / {p99:.1f} ms earlier."
            )
    return lines


def overhead_line(users: int, served: Sequence[float], bare: Sequence[float]) -> str:
    """Of seconds per step in each round."""
    with_engine, alone = (median_and_range(seconds, 1e3, digits=3) for seconds in (served, bare))
    ratio = median_and_range(ratios(served, bare), digits=3)
    return f"a step with {users} users, ms: {with_engine} served, {alone} its program alone; ratio {ratio}"


def draw(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Saves tokens a second, and milliseconds per token, of each side under each load."""
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    speed, latency = figure.subplots(1, 2)
    loads = list(results)
    sides = list(dict.fromkeys(side for load in loads for side in results[load]))
    for side in sides:
        colour = COLOURS[side]
        there = [i for i, load in enumerate(loads) if side in results[load]]
        found = [results[loads[i]][side] for i in there]
        rates = [statistics.median(mine["tokens_per_second"]) for mine in found]
        speed.plot(there, rates, marker="o", markersize=4, label=side, color=colour)
        for style, which in [("-", 0), (":", 1)]:
            values = [mine["normalised_ms"][which] for mine in found]
            latency.plot(there, values, style, marker="o", markersize=3, color=colour)
    for axes, title in [(speed, "tokens per second"), (latency, "ms per token (dotted: p99)")]:
        axes.set_xticks(range(len(loads)), loads, fontsize=8)
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_ylim(bottom=0)
    latency.set_yscale("log")
    for set_formatter in (latency.yaxis.set_major_formatter, latency.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    latency.tick_params(which="minor", labelsize=7)
    speed.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
