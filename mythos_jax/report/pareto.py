"""Quality against the loops it costs, in one form for every kind of data, and what halting saves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.results import Evaluation, Measurement, ReasoningTask

TOLERANCE = 0.005  # relative difference from the quality at the reference depth that still counts as equal

# Metrics of ours as charts name them; percentages read better than fractions. Others keep the harness's name and unit.
LABELS = {"bits_per_byte": "bits per byte", "exact_match": "exact match, %"}
SCALES = {"exact_match": 100.0}


@dataclass(frozen=True)
class Panel:
    """Measurements that can be compared: one metric on one group of the data, under several settings, of which at
    least one is a fixed depth.

    metric, group: as charts name them; group is "" where there is only one. trained_on: False for problems of a
    difficulty that the model was not trained on.
    """

    metric: str
    group: str
    higher_is_better: bool
    points: tuple[Measurement, ...]
    trained_on: bool = True

    @property
    def fixed(self) -> list[Measurement]:
        """Those at fixed depths, shallowest first."""
        return sorted((p for p in self.points if p.setting.is_fixed_depth), key=lambda p: p.setting.loops)

    @property
    def policies(self) -> dict[str, list[Measurement]]:
        """Those with halting, by criterion, and those of expected logits; fewest mean loops first."""
        by_criterion: dict[str, list[Measurement]] = {}
        for point in self.points:
            if point.setting.criterion is not None:
                by_criterion.setdefault(point.setting.criterion, []).append(point)
        return {name: sorted(points, key=lambda p: p.mean_loops) for name, points in by_criterion.items()}

    def fixed_value_at(self, mean_loops: float) -> float:
        """The value of fixed depths at this cost; between two depths, with some tokens at one and the rest at the
        other, it is interpolated."""
        return float(np.interp(mean_loops, [p.setting.loops for p in self.fixed], [p.value for p in self.fixed]))

    def matches(self, value: float, reference: float) -> bool:
        """Whether a value is as good as the reference, within `TOLERANCE`."""
        slack = TOLERANCE * abs(reference)
        return value >= reference - slack if self.higher_is_better else value <= reference + slack


@dataclass(frozen=True)
class Saving:
    """The cheapest point of a policy that keeps the quality of the reference depth.

    saved: fraction of the reference's loops. over_fixed: value minus that of fixed depths at the same mean loops.
    """

    point: Measurement
    saved: float
    over_fixed: float


def make_panels(evaluation: Evaluation) -> list[Panel]:
    """One per metric and group, in the order of the measurements; none where no fixed depth was measured, which happens
    when a task of the harness fails at some settings only."""
    points: dict[tuple[str, int | str | None], list[Measurement]] = {}
    for m in evaluation.results:
        scaled = replace(m, value=SCALES.get(m.metric, 1.0) * m.value)
        points.setdefault((m.metric, m.group), []).append(scaled)
    is_task, trained_on = False, []
    if isinstance(evaluation.data, ReasoningTask):
        is_task, trained_on = True, evaluation.data.trained_on
    return [
        Panel(
            metric=LABELS.get(metric, metric),
            group=f"difficulty {group}" if is_task else str(group or ""),
            higher_is_better=same[0].higher_is_better,
            points=tuple(same),
            trained_on=not is_task or group in trained_on,
        )
        for (metric, group), same in points.items()
        if any(m.setting.is_fixed_depth for m in same)
    ]


def pool(panels: Sequence[Panel], group: str) -> Panel:
    """The mean of panels with the same settings, all weighted equally."""
    by_setting: dict[Setting, list[Measurement]] = {}
    for panel in panels:
        for point in panel.points:
            by_setting.setdefault(point.setting, []).append(point)
    points = [
        replace(
            same[0],
            group=None,
            mean_loops=float(np.mean([p.mean_loops for p in same])),
            value=float(np.mean([p.value for p in same])),
        )
        for same in by_setting.values()
    ]
    return replace(panels[0], group=group, points=tuple(points))


def reference_depth(panel: Panel, trained_loops: int) -> Measurement:
    """The fixed depth that savings are relative to: the trained depth if it was measured, else the deepest."""
    return next((p for p in panel.fixed if p.setting.loops == trained_loops), panel.fixed[-1])


def savings(panel: Panel, trained_loops: int) -> dict[str | None, Saving | None]:
    """By criterion (None: fixed depths), the cheapest setting that keeps the quality of the reference depth; None where
    no setting does."""
    reference = reference_depth(panel, trained_loops)
    cheapest: dict[str | None, Saving | None] = {None: _cheapest(panel, panel.fixed, reference)}
    for criterion, points in panel.policies.items():
        cheapest[criterion] = _cheapest(panel, points, reference)
    return cheapest


def _cheapest(panel: Panel, points: Sequence[Measurement], reference: Measurement) -> Saving | None:
    good_enough = [p for p in points if panel.matches(p.value, reference.value)]
    if not good_enough:
        return None
    best = min(good_enough, key=lambda p: p.mean_loops)
    return Saving(
        best,
        saved=1 - best.mean_loops / reference.mean_loops,
        over_fixed=best.value - panel.fixed_value_at(best.mean_loops),
    )
