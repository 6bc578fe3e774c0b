"""Measurements as a text table, and the columns that the report's tables share with it."""

from collections.abc import Callable
from dataclasses import dataclass

from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.results import Evaluation, HarnessTasks, HeldOutText, Measurement, ReasoningTask


@dataclass(frozen=True)
class Column:
    """A heading, and the cell of a measurement."""

    heading: str
    cell: Callable[[Measurement], str]


LOOPS = Column("loops", lambda m: f"{m.setting.loops}" if m.setting.halting is None else f"≤ {m.setting.loops}")
HALTING = Column("halting", lambda m: policy_name(m.setting))
MEAN_LOOPS = Column("mean loops", lambda m: f"{m.mean_loops:.2f}")
LOSS_COLUMNS = [Column("nats/token", lambda m: f"{m.loss:.4f}"), Column("bits/byte", lambda m: f"{m.value:.4f}")]
PROBLEM_COLUMNS = [
    Column("difficulty", lambda m: f"{m.group}"),
    Column("exact match", lambda m: f"{m.value:.2%}"),
    Column("nats/answer", lambda m: f"{m.loss:.4f}"),
]
HARNESS_COLUMNS = [
    Column("task", lambda m: f"{m.group}"),
    Column("metric", lambda m: m.metric),
    Column("value", lambda m: f"{m.value:.4f}" + ("" if m.error is None else f" ± {m.error:.4f}")),
]


def columns(evaluation: Evaluation) -> list[Column]:
    """The columns of a table with a row per measurement; those about halting only if a policy was run."""
    halting = [] if all(m.setting.is_fixed_depth for m in evaluation.results) else [HALTING]
    match evaluation.data:
        case HeldOutText():
            return [LOOPS, *halting, *LOSS_COLUMNS, MEAN_LOOPS, *([_rank_column(evaluation)] if halting else [])]
        case ReasoningTask():
            return [LOOPS, *halting, *PROBLEM_COLUMNS, MEAN_LOOPS]
        case HarnessTasks():
            return [LOOPS, *halting, *HARNESS_COLUMNS, MEAN_LOOPS]


def _rank_column(evaluation: Evaluation) -> Column:
    """Spearman's correlation of a token's loss and its loops; empty for fixed depths, where loops are constant."""

    def cell(m: Measurement) -> str:
        correlation = evaluation.rank_correlations.get(m.setting)
        return "" if correlation is None else f"{correlation:+.2f}"

    return Column("rank corr.", cell)


def policy_name(setting: Setting) -> str:
    """For example "latent 0.03", "expected" for expected logits, or "none" for a fixed depth; a star marks a full
    forward pass that only estimates decoding."""
    if setting.criterion is None:
        return "none"
    if setting.expected:
        return "expected"
    return f"{setting.criterion} {setting.threshold:g}" + ("*" if setting.approximate else "")


def setting_name(setting: Setting) -> str:
    """As `policy_name`, but for example "8 loops" for a fixed depth."""
    loops = f"{setting.loops} loops" if setting.loops > 1 else "1 loop"
    if setting.criterion is None:
        return loops
    return f"expected, {loops}" if setting.expected else policy_name(setting)


def format_table(evaluation: Evaluation) -> str:
    """The measurements as lines of text with aligned columns."""
    shown = columns(evaluation)
    rows = [[column.heading for column in shown]]
    rows += [[column.cell(m) for column in shown] for m in evaluation.results]
    widths = [max(len(row[i]) for row in rows) for i in range(len(shown))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if any(m.setting.approximate for m in evaluation.results):
        lines.append("* reads the logits, so a full forward pass only estimates what decoding does")
    return "\n".join(lines)
