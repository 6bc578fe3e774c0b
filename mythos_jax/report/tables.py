"""Results as text and as rows for the report: one list of columns for each kind of result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mythos_jax.evaluation.results import DepthResult, Result, TaskResult


@dataclass(frozen=True)
class Column:
    """A heading, and what stands under it for a result."""

    name: str
    text: Callable[[Any], str]


def columns(results: Sequence[Result]) -> list[Column]:
    """The columns of a table of these results; those on halting only where something halts."""
    first = results[0]
    loops = Column("loops", lambda r: f"{r.loops}" if r.halting is None else f"≤ {r.loops}")
    mean = Column("mean loops", lambda r: f"{r.mean_loops:.2f}")
    halting = [Column("halting", policy)] if any(r.halting for r in results) else []
    if isinstance(first, DepthResult):
        rank = Column(
            "rank corr.", lambda r: "" if r.rank_correlation is None else f"{r.rank_correlation:+.2f}"
        )  # Spearman's
        return [
            loops,
            *halting,
            Column("nats/token", lambda r: f"{r.loss:.4f}"),
            Column("bits/byte", lambda r: f"{r.bits_per_byte:.4f}"),
            mean,
            *([rank] if halting else []),
        ]
    if isinstance(first, TaskResult):
        return [
            loops,
            *halting,
            Column("difficulty", lambda r: f"{r.difficulty}"),
            Column("exact match", lambda r: f"{r.exact_match:.2%}"),
            Column("nats/answer", lambda r: f"{r.loss:.4f}"),
            mean,
        ]
    return [
        loops,
        *halting,
        Column("task", lambda r: r.task),
        Column("metric", lambda r: r.metric),
        Column("value", lambda r: f"{r.value:.4f}" + ("" if r.error is None else f" ± {r.error:.4f}")),
        mean,
    ]


def policy(result: Result) -> str:
    """Criterion and threshold of a result; a star where a full forward pass is an estimate of decoding."""
    if result.halting is None:
        return "none"
    return f"{result.halting} {result.threshold:g}" + ("*" if result.approximate else "")


def format_table(results: Sequence[Result]) -> str:
    """The results as lines of text, columns aligned."""
    wanted = columns(results)
    rows = [[column.name for column in wanted], *([column.text(r) for column in wanted] for r in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(wanted))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if any(r.approximate for r in results):
        lines.append("* reads the logits: in a full forward pass an estimate of what decoding does")
    return "\n".join(lines)
