"""Line charts as inline SVG. Colours and fonts come from the page's style sheet, so light and dark mode both work."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

# Units of the view box, which the page scales to the column. It is small so that text stays legible on a phone.
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 74, 12, 22, 46  # margins around the plot
MIN_TICK_GAP, CHARACTER = 26, 8  # between the labels of the x axis; width of a character in them
LARGEST = 1e100  # absolute value that is drawn
N_COLOURS = 6  # classes c0 to c5 of the style sheet

# Markers differ in shape as well as in colour. Corners relative to the point; the circle has none.
MARKERS: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "square": [(-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)],
    "diamond": [(0, -5), (5, 0), (0, 5), (-5, 0)],
    "up": [(0, -5), (4.6, 3.6), (-4.6, 3.6)],
    "down": [(0, 5), (4.6, -3.6), (-4.6, -3.6)],
    "cross": [(-4.2, 0), (-1.4, -1.4), (0, -4.2), (1.4, -1.4), (4.2, 0), (1.4, 1.4), (0, 4.2), (-1.4, 1.4)],
}

Style = int | Literal["base"]  # the number of a line, or the grey line that others are compared with
Scale = Callable[[float], float]  # from a value to its coordinate


@dataclass(frozen=True)
class Series:
    """A line through points (x, y).

    notes: one per point, shown on hover. band: (x, low, high), shaded. dashed: drawn with gaps. marked: whether each
    point has a marker, without which there are no notes.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: Style = 0
    notes: Sequence[str] = ()
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False
    marked: bool = True


@dataclass(frozen=True)
class Axis:
    """ticks: default: round numbers. text: formats the label of a tick. limits: default: the range of the values."""

    label: str
    log: bool = False
    ticks: Sequence[float] = ()
    text: Callable[[float], str] = "{:g}".format
    limits: tuple[float, float] | None = None

    def shows(self, value: float) -> bool:
        """Whether a value has a place on the axis. NaN has none, nor what is too large or, on a log axis, too small."""
        return abs(value) <= LARGEST and not (self.log and value < 1 / LARGEST)


def line_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    alt: str,
    marker: tuple[float, str] | None = None,
    level: float | None = None,
) -> str:
    """An SVG chart with its legend. Points without a place in it, such as NaN, are left out; if none is left, there is
    no chart.

    alt: what it shows, for screen readers. marker: a vertical line at x, and its name. level: a horizontal line at y.
    """
    series = [_drawable(s, x, y) for s in series]
    if not any(s.points for s in series):
        return f'<p class="quiet">No chart of {escape(y.label)}: none of its values is a finite number.</p>'
    if level is not None and not y.shows(level):
        level = None
    xs = [px for s in series for px, _ in s.points]
    ys = [py for s in series for _, py in s.points] + [edge for s in series for _, *edges in s.band for edge in edges]
    if marker is not None:
        xs.append(marker[0])
    if level is not None:
        ys.append(level)
    x_scale, x_ticks = _scale(x, xs, LEFT + 10, WIDTH - RIGHT - 10)
    y_scale, y_ticks = _scale(y, ys, HEIGHT - BOTTOM - 8, TOP + 8)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">']
    parts += [_horizontal_line(y_scale(value), "grid", y.text(value)) for value in y_ticks]
    parts += [_vertical_line(x_scale(value), "grid", x.text(value)) for value in _thin_out(x_ticks, x_scale, x.text)]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, "middle", x.label, "label"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="translate(12 {middle}) rotate(-90)">{_text(0, 0, "middle", y.label, "label")}</g>')
    if level is not None:
        parts.append(_horizontal_line(y_scale(level), "mark"))
    if marker is not None:
        position = x_scale(marker[0])
        parts.append(_vertical_line(position, "mark"))
        # Near the right edge the name is to the left of its line, so that it is not cut off.
        parts.append(_text(position, TOP - 7, "end" if position > WIDTH - 60 else "middle", marker[1]))
    parts += [_draw(s, x_scale, y_scale) for s in series]
    return "".join(parts) + "</svg>" + _legend(series)


def _drawable(series: Series, x: Axis, y: Axis) -> Series:
    """Without the points that have no place in a chart."""
    shown = [i for i, point in enumerate(series.points) if x.shows(point[0]) and y.shows(point[1])]
    return replace(
        series,
        points=[series.points[i] for i in shown],
        notes=[series.notes[i] for i in shown] if series.notes else (),
        band=[edge for edge in series.band if x.shows(edge[0]) and y.shows(edge[1]) and y.shows(edge[2])],
    )


def _horizontal_line(y: float, css_class: str, label: str = "") -> str:
    line = f'<line class="{css_class}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + (_text(LEFT - 7, y + 4, "end", label) if label else "")


def _vertical_line(x: float, css_class: str, label: str = "") -> str:
    line = f'<line class="{css_class}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return line + (_text(x, HEIGHT - BOTTOM + 17, "middle", label) if label else "")


def _text(x: float, y: float, anchor: str, words: str, css_class: str = "number") -> str:
    return f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _draw(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    parts = [f'<g class="{_css_class(series)}">']
    if series.band:
        outline = [(x_scale(x), y_scale(low)) for x, low, _ in series.band]
        outline += [(x_scale(x), y_scale(high)) for x, _, high in reversed(series.band)]
        parts.append(f'<polygon class="band" points="{_coordinates(outline)}"/>')
    points = [(x_scale(x), y_scale(y)) for x, y in series.points]
    parts.append(f'<polyline class="{_line_class(series)}" points="{_coordinates(points)}"/>')
    # A line of one point has no length, and is seen by its marker alone.
    for i, point in enumerate(points if series.marked or len(points) == 1 else []):
        title = f"<title>{escape(series.notes[i])}</title>" if series.notes else ""
        parts.append(_marker(_shape(series), *point, title))
    return "".join(parts) + "</g>"


def _coordinates(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _marker(shape: str, x: float, y: float, title: str = "") -> str:
    corners = MARKERS[shape]
    if not corners:
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'
    return f'<polygon class="dot" points="{_coordinates([(x + dx, y + dy) for dx, dy in corners])}">{title}</polygon>'


def _legend(series: Sequence[Series]) -> str:
    """Nothing for a single line, which the axis names, unless it has a band to explain."""
    if len(series) < 2 and not any(s.band for s in series):
        return ""
    entries = "".join(
        f'<li class="{_css_class(s)}"><svg viewBox="0 0 30 12" aria-hidden="true">'
        f'<line class="{_line_class(s)}" x1="0" x2="30" y1="6" y2="6"/>{_marker(_shape(s), 15, 6) if s.marked else ""}'
        f"</svg>{escape(s.name)}</li>"
        for s in series
    )
    return f'<ul class="legend">{entries}</ul>'


def _css_class(series: Series) -> str:
    return "base" if series.style == "base" else f"c{series.style % N_COLOURS}"


def _line_class(series: Series) -> str:
    return "line dashed" if series.dashed else "line"


def _shape(series: Series) -> str:
    return "circle" if series.style == "base" else list(MARKERS)[series.style % len(MARKERS)]


def _scale(axis: Axis, values: Sequence[float], start: float, end: float) -> tuple[Scale, list[float]]:
    """Maps the range of the values to the coordinates from `start` to `end`; also the ticks in that range."""
    low, high = axis.limits or (min(values), max(values))
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1 / LARGEST):  # a single value: leave room around it
        margin = abs(low) / 10 or 1.0
        low, high = (low / 2, high * 2) if axis.log else (low - margin, high + margin)
    if axis.ticks:
        ticks = [tick for tick in axis.ticks if low <= tick <= high]
    else:
        ticks = _log_ticks(low, high) if axis.log else _linear_ticks(low, high)
    transform: Scale = math.log if axis.log else float

    def scale(value: float) -> float:
        return start + (transform(value) - transform(low)) / (transform(high) - transform(low)) * (end - start)

    return scale, ticks


def _linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers between low and high."""
    magnitude = 10 ** math.floor(math.log10((high - low) / 4))
    step = magnitude * min((m for m in (1, 2, 5, 10) if (high - low) / (m * magnitude) <= 5), default=10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high; where there are few, also multiples of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in [(1,), (1, 2, 5), range(1, 10)]:
        ticks = [m * 10.0**e for e in exponents for m in multiples if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    return ticks or [low, high]


def _thin_out(ticks: Sequence[float], scale: Scale, text: Callable[[float], str]) -> list[float]:
    """The ticks whose labels do not overlap, including the last one."""
    gap = max([MIN_TICK_GAP, *(CHARACTER * (len(text(tick)) + 1) for tick in ticks)])
    shown: list[float] = []
    for tick in reversed(ticks):
        if not shown or abs(scale(tick) - scale(shown[-1])) >= gap:
            shown.append(tick)
    return shown[::-1]
