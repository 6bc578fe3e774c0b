"""Sections of the report about quality: against loops at fixed depths, and against mean loops with halting."""

import math
from collections.abc import Callable, Sequence
from html import escape

from mythos_jax.evaluation.results import Evaluation, HarnessTasks, HeldOutText, Measurement, ReasoningTask
from mythos_jax.report.html import pair, section, table
from mythos_jax.report.pareto import Panel, pool, reference_depth, savings
from mythos_jax.report.svg import Axis, Series, Style, line_chart
from mythos_jax.report.tables import LOOPS, LOSS_COLUMNS, columns, setting_name

LOOP_TICKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # on a logarithmic axis
MEAN_LOOPS_AXIS = Axis("mean loops per token", log=True, ticks=LOOP_TICKS)

ESTIMATE = (
    " A star marks a criterion that reads the logits. In a full forward pass the coda sees its neighbours' current "
    "states, so the number is an estimate of what decoding does."
)


def depth_section(evaluation: Evaluation, panels: Sequence[Panel]) -> str:
    """Quality at each fixed depth: one chart per metric, and the numbers."""
    if not panels:
        return section("Quality against loops", "No fixed depth was measured.")
    by_metric: dict[str, list[Panel]] = {}
    for panel in panels:
        by_metric.setdefault(panel.metric, []).append(panel)
    charts = [_depth_chart(metric, same, evaluation.model.loops) for metric, same in by_metric.items()]
    words = "Every token runs the same number of loops."
    if not all(panel.trained_on for panel in panels):
        words += " Dotted: difficulties that the model was not trained on."
    return section("Quality against loops", words, pair("".join(charts), _depth_table(evaluation, panels)))


def _depth_chart(metric: str, panels: Sequence[Panel], trained_loops: int) -> str:
    lines = [
        _series(
            panel.group or "fixed depth",
            panel.fixed,
            x=lambda p: p.setting.loops,
            note=lambda p: f"{setting_name(p.setting)}: {p.value:.4g}",
            style=i,
            dashed=not panel.trained_on,
        )
        for i, panel in enumerate(panels)
    ]
    depths = sorted({p.setting.loops for panel in panels for p in panel.fixed})
    return line_chart(
        lines,
        Axis("loops", log=True, ticks=depths),
        _quality_axis(metric),
        alt=f"{metric} against loops. " + " ".join(_in_words(panel) for panel in panels),
        marker=(trained_loops, "trained") if depths[0] <= trained_loops <= depths[-1] else None,
    )


def _depth_table(evaluation: Evaluation, panels: Sequence[Panel]) -> str:
    """A row per fixed depth. Columns: for text loss and bits per byte, otherwise one per panel."""
    if isinstance(evaluation.data, HeldOutText):
        shown = [LOOPS, *LOSS_COLUMNS]
        rows = [[c.cell(m) for c in shown] for m in evaluation.results if m.setting.is_fixed_depth]
        return table([c.heading for c in shown], rows, "Loss at each depth")
    several_metrics = len({panel.metric for panel in panels}) > 1
    headings = [
        f"{panel.group}: {panel.metric}" if several_metrics else panel.group.replace("difficulty", "diff.")
        for panel in panels
    ]
    depths = sorted({p.setting.loops for panel in panels for p in panel.fixed})
    rows = [[str(depth), *(_cell(panel, depth) for panel in panels)] for depth in depths]
    return table(["loops", *headings], rows, f"{panels[0].metric} at each depth")


def _cell(panel: Panel, depth: int) -> str:
    """A panel's value at a fixed depth; empty where it was not measured."""
    return next((f"{p.value:.4g}" for p in panel.fixed if p.setting.loops == depth), "")


def halting_section(evaluation: Evaluation, panels: Sequence[Panel]) -> str:
    """Quality against mean loops for each policy, and what the cheapest settings of equal quality save."""
    if isinstance(evaluation.data, ReasoningTask):
        panels = _pool_difficulties(panels)
    with_heading = isinstance(evaluation.data, HarnessTasks)
    halted = [m for m in evaluation.results if not m.setting.is_fixed_depth]
    words = (
        "With halting, each token stops when its criterion is met; the cost is the mean over tokens of the loops that "
        "they ran. A policy is worth using where its line is on the better side of the line of fixed depths."
    )
    if any(m.setting.approximate for m in halted):
        words += ESTIMATE
    if any(m.setting.expected for m in halted):
        words += " Expected: all loops run, and the logits are their mean under the exit gate."
    shown = columns(evaluation)
    everything = table([c.heading for c in shown], [[c.cell(m) for c in shown] for m in halted], "Every halting policy")
    return section(
        "Quality against mean loops",
        words,
        *(_pareto(panel, evaluation.model.loops, with_heading) for panel in panels),
        f"<details><summary>All results of all policies</summary>{everything}</details>",
    )


def _pool_difficulties(panels: Sequence[Panel]) -> list[Panel]:
    """One panel for the difficulties trained on and, if there are others, one for all difficulties."""
    trained = [panel for panel in panels if panel.trained_on]
    pooled = [pool(trained, "Difficulties trained on, weighted equally")] if trained else []
    if len(trained) < len(panels):
        pooled.append(pool(panels, "All difficulties, weighted equally"))
    return pooled


def _pareto(panel: Panel, trained_loops: int, with_heading: bool) -> str:
    """Charts of one panel and its savings. with_heading: also names the metric in a heading."""
    reference = reference_depth(panel, trained_loops)
    fixed = _series(
        "fixed depth",
        panel.fixed,
        x=lambda p: p.mean_loops,
        note=lambda p: f"{setting_name(p.setting)}: {p.value:.4g}",
        style="base",
    )
    policies = [
        _series(
            _policy_label(criterion, points),
            points,
            x=lambda p: p.mean_loops,
            note=lambda p: f"{setting_name(p.setting)}: {p.value:.4g} at {p.mean_loops:.2f} loops",
            style=i,
        )
        for i, (criterion, points) in enumerate(panel.policies.items())
    ]
    chart = line_chart(
        [fixed, *policies],
        MEAN_LOOPS_AXIS,
        _quality_axis(panel.metric),
        alt=f"{panel.metric} against mean loops, one line for fixed depths and one per policy. {_in_words(panel)}",
        level=reference.value,
    )
    better = "higher" if panel.higher_is_better else "lower"
    words = (
        f"The cheapest setting of each policy within 0.5 % of the value at {setting_name(reference.setting)} "
        f"({reference.value:.4g}, the dashed line; {better} is better), and the fraction of loops it saves. "
        "Over fixed: the value minus that of fixed depths at the same mean loops."
    )
    name = f"{panel.group}: {panel.metric}" if with_heading else panel.group
    heading = f"<h3>{escape(name)}</h3>" if name else ""
    explained = f'<p class="quiet">{escape(words)}</p>'
    return heading + pair(chart, _over_fixed_chart(panel)) + pair(_savings_table(panel, trained_loops), explained)


def _savings_table(panel: Panel, trained_loops: int) -> str:
    rows = []
    for criterion, saving in savings(panel, trained_loops).items():
        if saving is None:
            rows.append([criterion or "fixed depth", "none", "", "", ""])
            continue
        over_fixed = "" if criterion is None else f"{saving.over_fixed:+.3g}"
        p = saving.point
        rows.append(
            [setting_name(p.setting), f"{p.mean_loops:.2f}", f"{saving.saved:.0%}", f"{p.value:.4g}", over_fixed]
        )
    return table(["cheapest", "loops", "saved", panel.metric, "over fixed"], rows, "What halting saves")


def _over_fixed_chart(panel: Panel) -> str:
    """Each policy minus fixed depths at the same cost: a difference too small to see in the full range of values."""

    def over_fixed(point: Measurement) -> float:
        return point.value - panel.fixed_value_at(point.mean_loops)

    series = []
    for i, (criterion, points) in enumerate(panel.policies.items()):
        # Outside the range of the fixed depths there is nothing to compare with.
        inside = [p for p in points if panel.fixed[0].setting.loops <= p.mean_loops <= panel.fixed[-1].setting.loops]
        if inside:
            series.append(
                _series(
                    _policy_label(criterion, points),
                    inside,
                    x=lambda p: p.mean_loops,
                    y=over_fixed,
                    note=lambda p: f"{setting_name(p.setting)}: {over_fixed(p):+.3g}",
                    style=i,
                )
            )
    if not series:
        return ""
    best_of = max if panel.higher_is_better else min
    best, best_name = best_of(
        ((y, s.name) for s in series for _, y in s.points if math.isfinite(y)), default=(math.nan, "none")
    )
    chart = line_chart(
        series,
        MEAN_LOOPS_AXIS,
        Axis(f"{panel.metric}, over fixed"),
        alt=f"Each policy minus fixed depths at the same mean loops; at best {best:+.3g}, by {best_name}.",
        level=0.0,
    )
    better = "above" if panel.higher_is_better else "below"
    words = f"The same, minus the value of fixed depths at the same cost: {better} 0 is better."
    return f'<figure>{chart}</figure><p class="quiet">{words}</p>'


def _series(
    name: str,
    points: Sequence[Measurement],
    *,
    x: Callable[[Measurement], float],
    note: Callable[[Measurement], str],
    style: Style,
    y: Callable[[Measurement], float] = lambda p: p.value,
    dashed: bool = False,
) -> Series:
    return Series(name, [(x(p), y(p)) for p in points], style, [note(p) for p in points], dashed=dashed)


def _policy_label(criterion: str, points: Sequence[Measurement]) -> str:
    return criterion + ("*" if points[0].setting.approximate else "")


def _quality_axis(metric: str) -> Axis:
    limits = (0.0, 100.0) if metric.endswith("%") else None
    return Axis(metric, limits=limits, text=lambda value: f"{value:.4g}")


def _in_words(panel: Panel) -> str:
    """The two ends of the line of fixed depths, for screen readers."""
    first, last = panel.fixed[0], panel.fixed[-1]
    name = f"{panel.group}: " if panel.group else ""
    return (
        f"{name}{first.value:.4g} at {setting_name(first.setting)}, {last.value:.4g} at {setting_name(last.setting)}."
    )
