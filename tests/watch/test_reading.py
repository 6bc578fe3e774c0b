"""Following a run's files as they grow, are cut, damaged, or cannot be read."""

import json
import math

import pytest

from mythos_jax.errors import ConfigError
from mythos_jax.training.loggers import JsonlLogger, RemoteJsonlLogger
from mythos_jax.watch import reading
from mythos_jax.watch.reading import WatchedRun
from tests.test_paths import store  # noqa: F401  a fixture
from tests.watch.conftest import RunDir

LINES = [
    {"step": 1, "time": 10.0, "loss": 3.5, "expert_load": [[0.25, 0.75]], "nested": {"a": 1}, "note": "x"},
    {"step": 2, "time": 11.0, "loss": None},
    {"step": 2, "time": 11.5, "held_out_loss": 3.0},
    {"step": 3, "time": 12.0, "loss": 2.5, "expert_load": [[0.5, 0.5]]},
]


def losses(run):
    return [(step, value) for step, value in run.history["loss"] if math.isfinite(value)]


def test_a_line_counts_when_it_is_complete(make_run, monkeypatch):
    """The file is seen at each of its lengths in turn, as it grows byte by byte; a line is longer than what is read
    at a time."""
    monkeypatch.setattr(reading, "_CHUNK", 50)
    made = make_run()
    content = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
    log = made.path / "metrics.jsonl"
    log.write_bytes(b"")
    run = WatchedRun(made.path)
    for end in range(len(content) + 1):
        log.write_bytes(content[:end])
        run.look()
        complete = [json.loads(line) for line in content[:end].split(b"\n")[:-1]]
        assert losses(run) == [(row["step"], row["loss"]) for row in complete if row.get("loss")]
    assert (run.history.step, run.history.expert_load) == (3, [[0.5, 0.5]])
    assert list(run.history["held_out_loss"]) == [(2, 3.0)]
    assert math.isnan(run.history["loss"].values[1])
    assert not run.history["note"]
    assert run.problem == ""


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_resumed_run_drops_the_steps_that_run_again(place, tmp_path):
    """The file is the logger's own. Lines are long, so that more than what is compared comes before the new ones."""
    made = RunDir(tmp_path / "run" if place == "disk" else "gs://bucket/run")
    log = JsonlLogger if place == "disk" else RemoteJsonlLogger
    run = WatchedRun(made.path)
    expected = {}
    for restored, last in [(0, 9), (3, 5), (5, 30), (2, 2), (2, 40)]:
        logger = log(made.path / "metrics.jsonl", restored)
        for step in range(restored + 1, last + 1):
            expected[step] = step + 100.0 * last
            logger.write(step, {"loss": expected[step], "gradient_norm": 0.123456789})
            if step % 4 == 0:
                logger.flush()
                run.look()
        logger.close()
        expected = {step: loss for step, loss in expected.items() if step <= last}
        run.look()
        assert dict(losses(run)) == expected
        assert run.history.step == last


def test_a_long_log_is_the_same_at_once_and_line_by_line(make_run):
    made, grown = make_run("long"), make_run("grown")
    follower = WatchedRun(grown.path)
    rows = [{"step": step, "expert_load": [[step / 100, 1.0]], "loss": float(step)} for step in range(1, 70)]
    made.log(*rows)
    for row in rows:
        grown.log(row)
        follower.look()
    for run in (WatchedRun(made.path), follower):
        assert losses(run) == [(row["step"], row["loss"]) for row in rows]
        assert run.history.expert_load == [[0.69, 1.0]]


def test_a_log_that_goes_back_without_being_cut(make_run):
    """As an object store may show it; `held_out_loss` has no later line that would replace it."""
    made = make_run()
    made.log(*({"step": step, "loss": 1.0 * step} for step in range(1, 6)), {"step": 5, "held_out_loss": 9.0})
    run = WatchedRun(made.path)
    made.log({"step": 3, "loss": 30.0})
    run.look()
    assert losses(run) == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert not run.history["held_out_loss"]


def test_damaged_files_are_read_as_far_as_they_can_be(make_run):
    made = make_run("some_run")
    damaged = [b"\xff", b"[1]", b'{"loss": 1}', b"[" * 100_000, b'{"step": 2, "loss": "x", "expert_load": [[1], "x"]}']
    damaged += [b'{"step": %d, "loss": 1}' % 10**30, b'{"step": -1, "loss": 1}']
    huge = b'{"step": 3, "loss": %d, "mean_loops": 1e999}' % 10**400
    (made.path / "metrics.jsonl").write_bytes(b"\n".join([b'{"step": 1, "loss": 2.0}', *damaged, huge, b""]))
    events = [b'{"event": "start", "time": 1.0, "step": 0}', b"\xff", b'{"event": "end"}', b'{"event": "en']
    events[1:1] = [b'{"event": "start", "time": NaN}', b'{"event": "start", "time": 1, "reached_time": "x"}']
    (made.path / "events.jsonl").write_bytes(b"\n".join(events))
    (made.path / "config.yaml").write_text("training: {stepss: 3}")
    (made.path / "lock.json").write_bytes(b"{")
    run = WatchedRun(made.path)
    assert (losses(run), run.history.step, run.history.expert_load) == ([(1, 2.0)], 3, [])
    assert [event["event"] for event in run.events] == ["start"]
    assert (run.name, run.config, run.owner) == ("some_run", None, None)
    assert "training.stepss: unknown" in run.problem


def test_what_is_no_run_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, problem in {
        "nothing": "no such directory",
        "file": "contains no run (no config.yaml)",
        "folder": "contains no run (no config.yaml)",
    }.items():
        with pytest.raises(ConfigError) as error:
            WatchedRun(tmp_path / name)
        allowed = "allowed: a run directory, which `mythos train` makes"
        assert str(error.value) == f"{tmp_path / name}: {problem}; {allowed}"


def test_a_run_that_has_written_nothing_but_its_lock(tmp_path):
    (tmp_path / "lock.json").write_text("{}")
    run = WatchedRun(tmp_path)
    assert (run.history.step, run.events, run.problem) == (0, [], "")


def test_storage_that_does_not_answer_for_a_while(make_run, monkeypatch):
    made = make_run()
    made.log({"step": 1, "loss": 2.0})
    run = WatchedRun(made.path)
    (made.path / "events.jsonl").mkdir()
    run.look()
    assert (losses(run), run.problem) == ([(1, 2.0)], "cannot be read (Is a directory)")
    (made.path / "events.jsonl").rmdir()
    made.log({"step": 2, "loss": 1.0})
    run.look()
    assert (losses(run), run.problem) == ([(1, 2.0), (2, 1.0)], "")
