"""Quality against the loops it costs: one view of all kinds of results, and what halting saves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.results import DepthResult, Result, TaskResult

TOLERANCE = 0.005  # quality that counts as kept: within so much of that at the trained depth, relatively


@dataclass(frozen=True)
class Point:
    """A setting, what it costs in loops a token, and what it gives."""

    loops: int
    halting: str | None
    threshold: float | None
    approximate: bool
    mean_loops: float
    value: float


@dataclass(frozen=True)
class Panel:
    """Points that can be compared: of one text, of one task at one difficulty, of one number of the harness."""

    measure: str
    group: str
    higher_is_better: bool
    points: tuple[Point, ...]

    @property
    def fixed(self) -> list[Point]:
        return sorted((p for p in self.points if p.halting is None), key=lambda p: p.loops)

    @property
    def policies(self) -> dict[str, list[Point]]:
        """By criterion, the cheapest first."""
        names = dict.fromkeys(p.halting for p in self.points if p.halting is not None)
        return {
            name: sorted((p for p in self.points if p.halting == name), key=lambda p: p.mean_loops) for name in names
        }

    def at(self, mean_loops: float) -> float:
        """What fixed depths give at this cost: between two depths, some tokens at one and the rest at the other."""
        return float(np.interp(mean_loops, [p.loops for p in self.fixed], [p.value for p in self.fixed]))

    def keeps(self, value: float, reference: float) -> bool:
        """Whether a value is as good as the reference, but for `TOLERANCE`."""
        slack = TOLERANCE * abs(reference)
        return value >= reference - slack if self.higher_is_better else value <= reference + slack


@dataclass(frozen=True)
class Saving:
    """The cheapest point of a policy (None: of the fixed depths) that keeps the quality of the reference depth.

    saved: share of the reference's loops. over_fixed: value less that of fixed depths at the same cost.
    """

    point: Point
    saved: float
    over_fixed: float


def panels(results: Sequence[Result]) -> list[Panel]:
    """One for each thing measured, in the order of the results."""
    found: dict[tuple[str, str, bool], list[Point]] = {}
    for r in results:
        if isinstance(r, DepthResult):
            key, value = ("bits per byte", "", False), r.bits_per_byte
        elif isinstance(r, TaskResult):
            key, value = ("exact match, %", f"difficulty {r.difficulty}", True), 100 * r.exact_match
        else:
            key, value = (r.metric, r.task, r.higher_is_better), r.value
        point = Point(r.loops, r.halting, r.threshold, r.approximate, r.mean_loops, value)
        found.setdefault(key, []).append(point)
    return [Panel(*key, tuple(points)) for key, points in found.items()]


def pooled(parts: Sequence[Panel], group: str) -> Panel:
    """The mean of panels with the same settings, each counting alike."""
    by_setting: dict[tuple, list[Point]] = {}
    for part in parts:
        for point in part.points:
            by_setting.setdefault((point.loops, point.halting, point.threshold, point.approximate), []).append(point)
    points = tuple(
        Point(*key, float(np.mean([p.mean_loops for p in same])), float(np.mean([p.value for p in same])))
        for key, same in by_setting.items()
    )
    return Panel(parts[0].measure, group, parts[0].higher_is_better, points)


def reference_depth(panel: Panel, trained: int) -> Point | None:
    """The fixed depth that savings are counted from: the trained one, if it was measured, else the deepest."""
    return next((p for p in panel.fixed if p.loops == trained), panel.fixed[-1] if panel.fixed else None)


def savings(panel: Panel, trained: int) -> dict[str | None, Saving | None]:
    """By criterion (None: fixed depths) the cheapest setting that keeps the quality of the reference depth, if any."""
    reference = reference_depth(panel, trained)
    if reference is None:
        return {}
    found: dict[str | None, Saving | None] = {}
    for name, points in {None: panel.fixed, **panel.policies}.items():
        good = [p for p in points if panel.keeps(p.value, reference.value)]
        best = min(good, key=lambda p: p.mean_loops, default=None)
        found[name] = best and Saving(
            best, 1 - best.mean_loops / reference.mean_loops, best.value - panel.at(best.mean_loops)
        )
    return found


def setting_name(point: Point | Setting) -> str:
    """As in "latent 0.03" or "8 loops"; a star where a full forward pass is an estimate of decoding."""
    if point.halting is None:
        return f"{point.loops} loops" if point.loops > 1 else "1 loop"
    criterion = point.criterion if isinstance(point, Setting) else point.halting
    return f"{criterion} {point.threshold:g}" + ("*" if point.approximate else "")
