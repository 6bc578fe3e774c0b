"""Names of the files of a run directory, and what it tells about the past of its run: the lines of metrics.jsonl and of
events.jsonl.

`events.jsonl` has one JSON object per line, with `event`, `time` (seconds since 1970) and whatever else belongs to it;
`start`: the run begins or goes on after `step`, having logged up to `reached` before; `end`: it ends after `step`, and
`how`, with a `message` if it has not finished. Others may appear, with a `message`. Steps that are run again after a
restart are no longer in metrics.jsonl; here nothing is ever dropped.
"""

import json
from typing import Any

from mythos_jax.json_text import parse_json
from mythos_jax.paths import is_remote

CONFIG_FILE, METRICS_FILE, EVENTS_FILE = "config.yaml", "metrics.jsonl", "events.jsonl"


def read_log(path: Any) -> tuple[list[tuple[dict[str, Any], bytes]], list[int]]:
    """The records of a `metrics.jsonl`, each with its line, and the numbers of the damaged lines, from 1.

    A last line without an end is neither: its writer was killed.
    """
    records, damaged = [], []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append((record, line))
        else:
            damaged.append(number)
    return records, damaged


def append_event(run_dir: Any, event: str, time: float, **fields: Any) -> None:
    """Appends a line to events.jsonl. Raises OSError."""
    path = run_dir / EVENTS_FILE
    line = json.dumps({"event": event, "time": round(time, 3), **fields}, allow_nan=False).encode() + b"\n"
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):  # the process that wrote it was killed
        line = b"\n" + line
    if is_remote(path):  # objects cannot be appended to; this one is small
        path.write_bytes(before + line)
        return
    with path.open("ab", buffering=0) as file:
        file.write(line)


def parse_events(content: bytes) -> list[dict[str, Any]]:
    """The events of a file, without lines that are damaged or not complete. Their times are numbers that a clock shows,
    their steps integers."""
    events = []
    for line in content.split(b"\n")[:-1]:
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and _is_sound(event):
            events.append(event)
    return events


def _is_sound(event: dict[str, Any]) -> bool:
    times = [event.get("time"), event.get("reached_time", 0)]
    steps = [event.get("step", 0), event.get("reached", 0)]
    return all(type(x) in (int, float) and 0 <= x < 2**33 for x in times) and all(type(x) is int for x in steps)
