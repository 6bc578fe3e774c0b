"""What the pictures of the benchmarks have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def panels(count: int, *, share: bool = False) -> tuple[Figure, list[Any]]:
    """An empty picture with this many axes side by side. share: they have one vertical axis."""
    figure = Figure(figsize=(6.4 if count == 1 else 4.5 * count, 4.0), dpi=150, layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=share, squeeze=False)[0])


def band(axes: Any, xs: Sequence[float], values: np.ndarray, **style: Any) -> None:
    """A line through the means over runs, and their range as a band. values: [runs, xs]."""
    (line,) = axes.plot(xs, values.mean(0), marker="o", markersize=4, **style)
    axes.fill_between(xs, values.min(0), values.max(0), alpha=0.15, color=line.get_color(), linewidth=0)


def loops_axis(axes: Any, depths: Sequence[int], label: str = "loops at evaluation") -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.set_xlabel(label)


def tidy(axes: Any, **legend: Any) -> None:
    """A faint grid, no frame, and a legend."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, **legend)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
