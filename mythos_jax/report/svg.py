"""Line charts as inline SVG. Colours and fonts come from the page's style sheet, so that light and dark both work."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Drawn small, so that letters stay legible where a phone shrinks the picture.
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 22, 46
COLOURS = 6  # classes c0 … c5 of the style sheet; `base` is the grey one
MARKS = ("circle", "square", "diamond", "up", "down", "cross")


@dataclass(frozen=True)
class Series:
    """A line: points (x, y), and for each what a pointer over it shows. style: a number, or "base" for the quiet one.
    band: (x, low, high), shaded. dashed: drawn with gaps."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int | str = 0
    notes: Sequence[str] = ()
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A label, and how numbers are placed and written. ticks: those given, else nice ones."""

    label: str
    log: bool = False
    ticks: Sequence[float] = ()
    text: Callable[[float], str] = "{:g}".format
    limits: tuple[float, float] | None = None


def line_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    alt: str,
    marker: tuple[float, str] | None = None,
    level: float = math.nan,
) -> str:
    """An SVG picture with its legend. alt: what it shows, in words. marker: a vertical line and its name. level: a
    horizontal line."""
    xs = [p[0] for s in series for p in s.points]
    ys = [p[1] for s in series for p in s.points] + [v for s in series for b in s.band for v in b[1:]]
    place_x, x_ticks = _scale(x, [*xs, *([marker[0]] if marker else [])], LEFT + 10, WIDTH - RIGHT - 10)
    place_y, y_ticks = _scale(y, [*ys, *([level] if math.isfinite(level) else [])], HEIGHT - BOTTOM - 8, TOP + 8)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">']
    parts += [_row(place_y(value), "grid", y.text(value)) for value in y_ticks]
    parts += [_column(place_x(value), "grid", x.text(value)) for value in _apart(x_ticks, place_x)]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, "middle", x.label, "label"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="translate(12 {middle}) rotate(-90)">{_text(0, 0, "middle", y.label, "label")}</g>')
    if math.isfinite(level):
        parts.append(_row(place_y(level), "mark"))
    if marker:
        at = place_x(marker[0])
        parts.append(_column(at, "mark"))
        parts.append(_text(at, TOP - 7, "end" if at > WIDTH - 60 else "middle", marker[1]))
    parts += [_drawn(s, place_x, place_y) for s in series]
    return "".join(parts) + "</svg>" + _legend(series)


def _row(y: float, kind: str, number: str = "") -> str:
    line = f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + (_text(LEFT - 7, y + 4, "end", number) if number else "")


def _column(x: float, kind: str, number: str = "") -> str:
    line = f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return line + (_text(x, HEIGHT - BOTTOM + 17, "middle", number) if number else "")


def _text(x: float, y: float, anchor: str, words: str, kind: str = "number") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _drawn(series: Series, place_x: Callable, place_y: Callable) -> str:
    points = [(place_x(px), place_y(py)) for px, py in series.points]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    parts = [f'<g class="{_class(series)}">']
    if series.band:
        around = [(place_x(b[0]), place_y(b[1])) for b in series.band]
        around += [(place_x(b[0]), place_y(b[2])) for b in reversed(series.band)]
        parts.append('<polygon class="band" points="' + " ".join(f"{a:.1f},{b:.1f}" for a, b in around) + '"/>')
    parts.append(f'<polyline class="line{" dashed" if series.dashed else ""}" points="{line}"/>')
    for i, at in enumerate(points):
        note = f"<title>{escape(series.notes[i])}</title>" if series.notes else ""
        parts.append(_mark(_shape(series), *at, note))
    return "".join(parts) + "</g>"


def _mark(shape: str, x: float, y: float, note: str = "") -> str:
    outlines = {
        "square": [(-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)],
        "diamond": [(0, -5), (5, 0), (0, 5), (-5, 0)],
        "up": [(0, -5), (4.6, 3.6), (-4.6, 3.6)],
        "down": [(0, 5), (4.6, -3.6), (-4.6, -3.6)],
        "cross": [(-4.2, 0), (-1.4, -1.4), (0, -4.2), (1.4, -1.4), (4.2, 0), (1.4, 1.4), (0, 4.2), (-1.4, 1.4)],
    }
    if shape == "circle":
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4">{note}</circle>'
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in outlines[shape])
    return f'<polygon class="dot" points="{points}">{note}</polygon>'


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2 and not any(s.band for s in series):
        return ""
    entries = "".join(
        f'<li class="{_class(s)}"><svg viewBox="0 0 30 12" aria-hidden="true">'
        f'<line class="line{" dashed" if s.dashed else ""}" x1="0" x2="30" y1="6" y2="6"/>{_mark(_shape(s), 15, 6)}'
        f"</svg>{escape(s.name)}</li>"
        for s in series
    )
    return f'<ul class="legend">{entries}</ul>'


def _class(series: Series) -> str:
    return "base" if series.style == "base" else f"c{series.style % COLOURS}"


def _shape(series: Series) -> str:
    return "circle" if series.style == "base" else MARKS[series.style % len(MARKS)]


def _scale(
    axis: Axis, values: Sequence[float], start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value stands between `start` and `end`, and the ticks."""
    low, high = axis.limits or (min(values), max(values))
    if low == high:
        around = abs(low) / 10 or 1.0
        low, high = (low / 2, high * 2) if axis.log else (low - around, high + around)
    turn = math.log if axis.log else float
    if axis.ticks:
        ticks = [t for t in axis.ticks if low <= t <= high]
    elif axis.log:
        ticks = _round(low, high)
    else:
        ticks = _nice(low, high)

    def place(value: float) -> float:
        return start + (turn(value) - turn(low)) / (turn(high) - turn(low)) * (end - start)

    return place, ticks


def _nice(low: float, high: float) -> list[float]:
    """Some five round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= min((m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5), default=10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _round(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, with 2 and 5 times them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in (1,), (1, 2, 5), range(1, 10):
        ticks = [d * 10.0**e for e in exponents for d in digits if low <= d * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    return ticks or [low, high]


def _apart(ticks: Sequence[float], place: Callable[[float], float], gap: float = 26) -> list[float]:
    """Ticks whose numbers do not touch; the last stays."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or abs(place(tick) - place(kept[-1])) >= gap:
            kept.append(tick)
    return kept[::-1]
