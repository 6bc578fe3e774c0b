"""What the log of a run tells: each number as a curve over the steps."""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any

LARGEST = 1e100  # absolute value of a number that is kept


class Curve:
    """The values of one name of the log at ascending steps; NaN where the log has null, or what no chart can show."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.steps, self.values, strict=True)

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None

    def add(self, step: int, value: float) -> None:
        """Adds a value; any at this step or later is replaced."""
        self.cut(step)
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: int) -> None:
        """Drops the values from a step on."""
        end = bisect_left(self.steps, step)
        if end < len(self.steps):
            del self.steps[end:], self.values[end:]

    def without(self, indices: set[int]) -> "Curve":
        """A copy without some of the values."""
        copy = Curve()
        copy.steps, copy.values = self.steps[:], self.values[:]
        for index in sorted(indices, reverse=True):
            if index < len(copy):
                del copy.steps[index], copy.values[index]
        return copy

    def mean(self, after: int, upto: int) -> float | None:
        """Of the values at the steps after + 1 to upto, without NaN; None if there is none."""
        part = self.values[bisect_right(self.steps, after) : bisect_right(self.steps, upto)]
        finite = [value for value in part if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else None


class History:
    """The lines of a log. When a line comes that is not after the ones before, the run has been resumed at an earlier
    step, and what was logged from there on is dropped."""

    def __init__(self) -> None:
        self.step = 0  # of the last line
        self.expert_load: list[list[float]] = []  # of the last line that has it: layer, expert
        self._curves: dict[str, Curve] = {}

    def __getitem__(self, name: str) -> Curve:
        """An empty curve for a name that the log does not have."""
        return self._curves.get(name, Curve())

    def add(self, line: dict[str, Any]) -> None:
        """line: with a `step`."""
        step = line["step"]
        if step < self.step:
            for curve in self._curves.values():
                curve.cut(step)
        self.step = step
        for name, value in line.items():
            if name == "expert_load":
                self.expert_load = value if _is_table(value) else self.expert_load
            elif value is None or type(value) in (int, float):
                curve = self._curves.setdefault(name, Curve())
                curve.add(step, value if value is not None and abs(value) <= LARGEST else math.nan)


def _is_table(value: Any) -> bool:
    rows = isinstance(value, list) and value and all(isinstance(row, list) and row for row in value)
    return bool(rows) and all(type(x) in (int, float) for row in value for x in row)
