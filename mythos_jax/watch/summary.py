"""A watched run in numbers: its state, its last line, and where its time has gone."""

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mythos_jax.runs.owner import PATIENCE, Owner
from mythos_jax.watch.history import Curve, History
from mythos_jax.watch.reading import WatchedRun

State = Literal["starting", "training", "silent", "lost", "finished", "stopped", "failed", "ended"]

_CLOCKS = 30  # seconds that the clocks of two machines may differ by
_SILENCE = 60  # seconds; no line for this long, and for ten times as long as usual, is worth saying
_LINES = 50  # lines that the time left is estimated from


@dataclass(frozen=True)
class Times:
    """Where the time since a run's first start has gone, in seconds; they add up to `total`.

    counted: steps that still count. lost: steps that were run again after a restart. down: from the last line before
    a restart to the start. rest: compiling, waiting for data, evaluating, saving.
    """

    total: float
    counted: float
    lost: float
    down: float

    @property
    def rest(self) -> float:
        return max(self.total - self.counted - self.lost - self.down, 0.0)

    @property
    def goodput(self) -> float:
        return min(self.counted / self.total, 1.0) if self.total else 0.0


@dataclass(frozen=True)
class Summary:
    """values: of the last line that has each, by name; without those that are NaN. seconds_left: None if not training.
    restarts, lost_steps, times: None of a run whose starts are not known."""

    name: str
    path: str
    state: State
    detail: str
    step: int
    steps: int | None
    values: dict[str, float]
    seconds_left: float | None
    restarts: int | None
    lost_steps: int | None
    times: Times | None
    problem: str

    def to_json(self) -> dict[str, Any]:
        times = self.times and {
            "total": round(self.times.total, 1),
            "counted": round(self.times.counted, 1),
            "lost": round(self.times.lost, 1),
            "down": round(self.times.down, 1),
            "rest": round(self.times.rest, 1),
        }
        fields = {
            "name": self.name,
            "path": self.path,
            "state": self.state,
            "detail": self.detail,
            "step": self.step,
            "steps": self.steps,
            "seconds_left": self.seconds_left and round(self.seconds_left, 1),
            "restarts": self.restarts,
            "lost_steps": self.lost_steps,
            "goodput_since_first_start": self.times and round(self.times.goodput, 4),
            "seconds": times,
            "last": self.values,
        }
        return fields | ({"problem": self.problem} if self.problem else {})


# Of the last line, in the order in which they are shown.
NAMES = (
    "loss", "held_out_loss", "mean_loops", "tokens_per_second", "flops_per_second", "mfu", "goodput",
    "step_seconds_p50", "step_seconds_p90", "step_seconds_max", "data_wait",
    "hbm_bytes", "hbm_peak_bytes", "hbm_limit_bytes", "load_imbalance", "learning_rate", "gradient_norm", "skipped",
)  # fmt: skip


def names(runs: Sequence[WatchedRun]) -> list[str]:
    """What the runs are called: by their configs, or where that is not enough by their folders, or by their paths."""
    found: list[str] = []
    for kind in (lambda run: run.name, lambda run: run.path.name, lambda run: str(run.path)):
        found = [kind(run) for run in runs]
        if len(set(found)) == len(found):
            break
    return found


def summarise_all(runs: Sequence[WatchedRun]) -> list[Summary]:
    return [summarise(run, name) for name, run in zip(names(runs), runs, strict=True)]


def summarise(run: WatchedRun, name: str) -> Summary:
    """name: what the run is called."""
    history, starts = run.history, starts_of(run)
    steps = run.config.training.steps if run.config else None
    state, detail = _state(run, steps)
    found = {field: history[field].last for field in NAMES}
    return Summary(
        name=name,
        path=str(run.path),
        state=state,
        detail=detail,
        step=history.step,
        steps=steps,
        values={field: value for field, value in found.items() if value is not None and math.isfinite(value)},
        seconds_left=_seconds_left(history, starts, steps) if state == "training" else None,
        restarts=len(starts) - 1 if starts else None,
        lost_steps=sum(lost_steps(start) for start in starts) if starts else None,
        times=_times(run, starts, is_live=state in ("starting", "training", "silent")),
        problem=run.problem,
    )


def starts_of(run: WatchedRun) -> list[dict[str, Any]]:
    """The events of its starts, those alone whose step is known."""
    return [event for event in run.events if event["event"] == "start" and type(event.get("step")) is int]


def steady(run: WatchedRun, name: str) -> Curve:
    """A curve without the first line of each start, whose rates include compiling and opening the data."""
    curve = run.history[name]
    return curve.without({bisect_right(curve.steps, start["step"]) for start in starts_of(run)} or {0})


def lost_steps(start: dict[str, Any]) -> int:
    """Logged steps that a start has to run again."""
    reached = start.get("reached")
    return max(reached - start["step"], 0) if type(reached) is int else 0


def _state(run: WatchedRun, steps: int | None) -> tuple[State, str]:
    last = run.events[-1] if run.events else {}
    is_done = steps is not None and run.history.step >= steps
    ended = last.get("event") == "end"
    how, message = last.get("how") if ended else None, str(last.get("message", ""))
    if run.owner is not None and not (ended and is_done):
        state = _held_state(run, run.owner, "starting" if ended else last.get("event", ""))
        if state[0] != "lost" or how != "failed":  # a process that hangs says so, and ends without giving up the run
            return state
    if how == "stopped":
        return "stopped", f"by {message}"
    if how == "failed":
        return "failed", message
    return ("finished", "") if is_done else ("ended", "no process trains here")


def _held_state(run: WatchedRun, owner: Owner, last: str) -> tuple[State, str]:
    """Of a run whose lock is held."""
    alive = owner.is_alive(Owner.this_process().place)
    if alive is None:  # elsewhere: from here, only the lock's age is seen
        alive = run.looked - owner.renewed < PATIENCE + _CLOCKS
    if not alive:
        return "lost", f"{owner}; the same command resumes the run"
    starts, times = starts_of(run), run.history["time"]
    began = starts[-1]["time"] if starts else 0.0
    if last == "starting" or (starts and (times.last or 0.0) < began):
        return "starting", ""
    if not times:
        return ("training", "") if run.history.step else ("starting", "")
    silence = run.looked - times.values[-1]
    recent = times.values[-_LINES:]
    usual = (recent[-1] - recent[0]) / (len(recent) - 1) if len(recent) > 1 else 0.0
    if silence > max(_SILENCE, 10 * usual):
        return "silent", f"no line for {duration(silence)}"
    return "training", ""


def _seconds_left(history: History, starts: list[dict[str, Any]], steps: int | None) -> float | None:
    """By the pace of the last lines since the newest start, evaluating and saving included."""
    times, began = history["time"], starts[-1]["time"] if starts else 0.0
    recent = [(step, when) for step, when in list(times)[-_LINES:] if when >= began]
    if steps is None or len(recent) < 2:
        return None
    (first, begin), (last, end) = recent[0], recent[-1]
    return (steps - history.step) * (end - begin) / (last - first)


def _times(run: WatchedRun, starts: list[dict[str, Any]], is_live: bool) -> Times | None:
    pace = run.history["step_seconds_p50"]
    if not starts:
        return None
    signs = [event["time"] for event in run.events] + ([run.history["time"].values[-1]] if run.history["time"] else [])
    end = run.looked if is_live else max(signs)
    down = 0.0
    for start in starts[1:]:
        before = [event["time"] for event in run.events if event["time"] < start["time"]]
        down += max(start["time"] - max([*before, start.get("reached_time", 0.0)]), 0.0)
    total = max(end - starts[0]["time"], 0.0)
    lost = sum(lost_steps(start) for start in starts) * _median(pace)
    return Times(total, _step_seconds(run.history, starts[0]["step"]), lost, down)


def _step_seconds(history: History, first: int) -> float:
    """The time of the steps after `first` that have been logged. A line without a step time, as a start's first one,
    has that of the next."""
    paces = dict(history["step_seconds_p50"])
    total, pending, before = 0.0, 0, first
    for step in history["loss"].steps:
        if step <= first:
            continue
        pending, before = pending + step - before, step
        pace = paces.get(step)
        if pace is not None and math.isfinite(pace):
            total, pending = total + pending * pace, 0
    return total + pending * _median(history["step_seconds_p50"])


def _median(curve: Curve) -> float:
    finite = sorted(value for value in curve.values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else 0.0


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def clock(seconds: float) -> str:
    """A time of day, with its date, where this machine is."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
