"""Curves as characters: lines of Braille dots with axes, and sparklines."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from mythos_jax.watch.history import Curve

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
_BLOCKS = "▁▂▃▄▅▆▇█"
_BRAILLE, _DOTS = 0x2800, ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a cell: row, column
_GUTTER = 9  # columns of the y axis


@dataclass(frozen=True)
class Plotted:
    """A curve as it is drawn. mark: one character at its end, in place of a legend without colours."""

    curve: Curve
    colour: str
    mark: str = ""


def plot(lines: Sequence[Plotted], width: int, height: int) -> list[Text]:
    """A chart with both axes, `height` + 2 lines high, the y axis logarithmic; nothing if there is nothing to draw."""
    columns = max(width - _GUTTER - 1, 4)
    drawn = [(line, points) for line in lines if (points := _positive(line.curve))]
    if not drawn:
        return []
    first, last = min(points[0][0] for _, points in drawn), max(points[-1][0] for _, points in drawn)
    averaged = [_averaged(points, first, last, 2 * columns) for _, points in drawn]
    heights = [y for dots in averaged for _, y in dots]
    low, high = min(heights), max(heights)
    if high - low < 1e-3:
        low, high = low - 0.05, high + 0.05
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    marks: dict[tuple[int, int], tuple[str, str]] = {}
    for (line, _), heights_of in zip(drawn, averaged, strict=True):
        dots = [(x, 4 * height - 1 - _scaled(y, low, high, 4 * height - 1)) for x, y in heights_of]
        for x, y in _joined(dots):
            bits, _ = cells.get((y // 4, x // 2), (0, ""))
            cells[y // 4, x // 2] = bits | _DOTS[y % 4][x % 2], line.colour
        if line.mark:
            x, y = dots[-1]
            marks[y // 4, min(x // 2 + 1, columns - 1)] = line.mark, line.colour
    labels = {0: high, height // 2: (low + high) / 2, height - 1: low}
    rows = [_row(row, columns, cells, marks, labels.get(row)) for row in range(height)]
    return rows + _x_axis(f"{first:,}", f"step {last:,}", columns)


def _x_axis(left: str, right: str, columns: int) -> list[Text]:
    gap = max(columns - len(left) - len(right), 1)
    return [
        Text(f"{' ' * (_GUTTER - 1)}└{'─' * columns}", style="dim"),
        Text(f"{' ' * _GUTTER}{left}{' ' * gap}{right}", style="dim"),
    ]


def sparkline(values: Sequence[float], width: int, low: float | None = None) -> str:
    """Values as bars, averaged where there are more than `width`; from `low`, or from their smallest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    step = max(len(finite) / width, 1.0)
    ends = [round(i * step) for i in range(round(len(finite) / step) + 1)]
    bars = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(ends) if b > a]
    bottom, top = min(bars) if low is None else low, max(bars)
    if top - bottom <= 1e-9 * max(abs(top), 1e-9):
        return _BLOCKS[3] * len(bars)
    return "".join(_BLOCKS[_scaled(bar, bottom, top, len(_BLOCKS) - 1)] for bar in bars)


def _positive(curve: Curve) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if math.isfinite(value) and value > 0]


def _scaled(value: float, low: float, high: float, top: int) -> int:
    return round((value - low) / (high - low) * top) if high > low else 0


def _averaged(points: Sequence[tuple[int, float]], first: int, last: int, columns: int) -> list[tuple[int, float]]:
    """For each column that has points, the mean of the logarithms of their values."""
    found: dict[int, list[float]] = {}
    for step, value in points:
        found.setdefault(_scaled(step, first, last, columns - 1), []).append(math.log(value))
    return [(x, sum(logs) / len(logs)) for x, logs in found.items()]


def _joined(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots and those of the lines between them."""
    found = list(dots[:1])
    for (x0, y0), (x1, y1) in itertools.pairwise(dots):
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        found += [(round(x0 + (x1 - x0) * i / n), round(y0 + (y1 - y0) * i / n)) for i in range(1, n + 1)]
    return found


def _row(
    row: int,
    columns: int,
    cells: dict[tuple[int, int], tuple[int, str]],
    marks: dict[tuple[int, int], tuple[str, str]],
    label: float | None,
) -> Text:
    """label: the logarithm of the value at this height, if it is to be shown."""
    tick = "" if label is None else f"{math.exp(label):.3g}"
    text = Text(f"{tick:>{_GUTTER - 2}} {'│' if label is None else '┤'}", style="dim")
    for column in range(columns):
        if (row, column) in marks:
            character, colour = marks[row, column]
            text.append(character, style=f"bold not dim {colour}")
            continue
        bits, colour = cells.get((row, column), (0, ""))
        text.append(chr(_BRAILLE + bits) if bits else " ", style=f"not dim {colour}" if bits else "")
    return text
