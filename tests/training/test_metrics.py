"""Throughput, step times and goodput against a clock that is set by hand; what a run says of its starts and ends."""

import contextlib
import dataclasses
import json
import signal
import types

import pytest

from mythos_jax.chips import CHIPS, peak_flops
from mythos_jax.errors import BadStepError, Interrupted
from mythos_jax.flops import training_flops
from mythos_jax.runs.records import parse_events
from mythos_jax.sharding import make_mesh
from mythos_jax.training import events, metrics
from mythos_jax.training.loggers import JsonlLogger
from mythos_jax.training.metrics import RunLog, StepTimes, Throughput, memory_in_use


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


def logged(run):
    """The lines of the log, without the time of day."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_throughput_since_the_last_report(clock):
    throughput = Throughput(peak_flops=1e6)
    for _ in range(4):
        throughput.add(tokens=100, flops=2_000_000)
    clock.now += 16
    assert throughput.report() == {"tokens_per_second": 25.0, "flops_per_second": 500_000, "mfu": 0.5}
    throughput.add(tokens=100, flops=1_000_000)
    clock.now += 2
    assert throughput.report() == {"tokens_per_second": 50.0, "flops_per_second": 500_000, "mfu": 0.5}


def test_mfu_is_left_out_where_the_peak_is_unknown(clock):
    throughput = Throughput(peak_flops=None)
    clock.now += 1
    assert throughput.report() == {"tokens_per_second": 0.0, "flops_per_second": 0}


def test_pauses_are_in_no_rate(config, clock, tmp_path):
    """Steps of 1 s each; after the second, 60 s of saving."""
    with RunLog(config, make_mesh(config.mesh), tmp_path, start=0, progress=False) as log:
        for step in range(1, 5):
            clock.now += 1
            log.steps([(step, {"loss": 1.0, "tokens": 128.0, "mean_loops": 2.0})])
            if step == 2:
                with log.pause():
                    clock.now += 60
    rows = logged(tmp_path)
    assert [row["tokens_per_second"] for row in rows] == [128.0] * 4
    assert rows[-1]["goodput"] == pytest.approx(4 / 64, abs=1e-4)


def test_steps_that_are_read_together_share_their_rate(config, clock, tmp_path):
    """Steps of 1 s each, of which the second and third are read at the same moment."""
    with RunLog(config, make_mesh(config.mesh), tmp_path, start=0, progress=False) as log:
        for steps in [(1,), (2, 3), (4,), ()]:
            clock.now += len(steps)
            log.steps([(step, {"loss": 1.0, "tokens": 128.0, "mean_loops": 2.0}) for step in steps])
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {(row["tokens_per_second"], row["goodput"]) for row in rows} == {(128.0, 1.0)}
    assert log.last == rows[-1]


def test_goodput_is_the_fraction_of_time_in_steps(clock):
    times = StepTimes()
    assert times.goodput() == 0
    for seconds in (7, 1, 1):  # the first step waits for the compiler
        clock.now += seconds
        times.add(1)
    clock.now += 1
    assert times.goodput() == pytest.approx(3 / 10)


def test_step_times_since_the_last_line(clock):
    """The first step, which waits for the compiler, is in none; a pause is in no step."""
    times = StepTimes()
    clock.now += 50
    times.add(1)
    assert times.report() == {}
    for seconds in [*range(1, 11), 0]:
        clock.now += seconds
        times.add(1 if seconds else 0)
    assert times.report() == {"step_seconds_p50": 5.5, "step_seconds_p90": 9.1, "step_seconds_max": 10.0}
    times.pause(60)
    clock.now += 60 + 4
    times.add(2)
    assert times.report() == {"step_seconds_p50": 2.0, "step_seconds_p90": 2.0, "step_seconds_max": 2.0}


def test_the_wait_for_a_batch_is_measured(config, clock, tmp_path):
    """Batches take 0.5 s and 1.5 s; a step 3 s, which is not part of the wait. No batch is read that is not used."""
    read = []

    def batches():
        for seconds in [0.5, 1.5, 2.5]:
            clock.now += seconds
            read.append(seconds)
            yield seconds

    with RunLog(config, make_mesh(config.mesh), tmp_path, start=0, progress=False) as log:
        for step, seconds in zip([1, 2], log.waiting(batches()), strict=False):
            assert seconds == read[-1]
            clock.now += 3
            log.steps([(step, {"loss": 1.0, "tokens": 128.0, "mean_loops": 2.0})])
        assert list(log.waiting([])) == []
    assert [row["data_wait"] for row in logged(tmp_path)] == [0.5, 1.5]
    assert read == [0.5, 1.5]


def test_memory_is_that_of_the_fullest_device():
    def device(**stats):
        return types.SimpleNamespace(memory_stats=lambda: stats or None)

    full = device(bytes_in_use=10, peak_bytes_in_use=90, bytes_limit=100, num_allocs=3)
    other = device(bytes_in_use=70, peak_bytes_in_use=80, bytes_limit=100)
    assert memory_in_use([other, full]) == {"hbm_bytes": 10, "hbm_peak_bytes": 90, "hbm_limit_bytes": 100}
    assert memory_in_use([device(bytes_in_use=5, peak_bytes_in_use=-1)]) == {"hbm_bytes": 5}
    assert memory_in_use([device()]) == {}


def test_starts_and_ends_are_kept(config, tmp_path):
    """A run logs steps 1 to 3, fails, resumes after step 2, is stopped after step 3, and finishes."""
    mesh = make_mesh(config.mesh)

    def run(start, steps, error):
        with contextlib.suppress(Exception), RunLog(config, mesh, tmp_path, start, progress=False) as log:
            for step in steps:
                log.steps([(step, {"loss": 1.0, "tokens": 128.0, "mean_loops": 2.0})])
            if error:
                raise error

    run(0, [1, 2, 3], BadStepError("step 4: loss is nan"))
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    (tmp_path / "events.jsonl").open("a").write('{"event": "sta')
    run(2, [3], Interrupted(signal.SIGTERM, 3))
    run(3, [4], None)
    starts = parse_events((tmp_path / "events.jsonl").read_bytes())
    told = [(e["event"], e["step"], e.get("reached"), e.get("how"), e.get("message")) for e in starts]
    assert told == [
        ("start", 0, 0, None, None),
        ("end", 3, None, "failed", "step 4: loss is nan"),
        ("start", 2, 3, None, None),
        ("end", 3, None, "stopped", "SIGTERM"),
        ("start", 3, 3, None, None),
        ("end", 4, None, "finished", None),
    ]
    assert starts[2]["reached_time"] == last["time"]
    assert (starts[0]["devices"], starts[0]["processes"], starts[0]["device_kind"]) == (1, 1, "cpu")


def test_events_that_cannot_be_written_stop_no_run(config, tmp_path, capsys):
    (tmp_path / "events.jsonl").mkdir()
    with RunLog(config, make_mesh(config.mesh), tmp_path, start=0, progress=False):
        pass
    line = f"{tmp_path}/events.jsonl: cannot be written (Is a directory); the run goes on without this line\n"
    assert capsys.readouterr().err == 2 * line


class StoreError(Exception):
    """As those of gcsfs, which are no OSErrors."""


def test_an_object_store_that_fails_neither_stops_a_run_nor_changes_how_it_ends(config, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise StoreError("503, try again")

    monkeypatch.setattr(events, "append_event", fail)
    monkeypatch.setattr(JsonlLogger, "close", fail)
    with (
        pytest.raises(Interrupted),
        RunLog(config, make_mesh(config.mesh), tmp_path, start=0, progress=False),
    ):
        raise Interrupted(signal.SIGTERM, 3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"{tmp_path}/events.jsonl: cannot be written (503, try again); the run goes on without this line"
    )
    assert lines[1] == "warning: the last lines of the log may be missing (503, try again)"
    with pytest.raises(StoreError), RunLog(config, make_mesh(config.mesh), tmp_path, start=0, progress=False):
        pass  # nothing else is wrong


def test_the_log_reports_flops_at_the_depth_that_was_trained(config, clock, tmp_path):
    """Two steps in two seconds on a device whose peak is known."""
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=3))
    (device,) = make_mesh(config.mesh).devices.flat
    with RunLog(config, make_mesh(config.mesh), tmp_path, start=1, progress=False) as log:
        log._throughput = Throughput(peak_flops=1e9)
        for step, loops in [(2, 2.0), (3, 1.5)]:
            clock.now += 1
            log.steps([(step, {"loss": 1.0, "tokens": 128.0, "mean_loops": loops})])
    rows = logged(tmp_path)
    assert [row["flops_per_second"] for row in rows] == [training_flops(config), training_flops(config, 1.5)]
    assert rows[0]["mfu"] == pytest.approx(training_flops(config) / 1e9, abs=1e-4)
    assert peak_flops([device]) is None
    assert log.last == rows[-1]
    rate = training_flops(config, 1.5)
    assert log._bar._note == f"loss 1.000, 128 tokens/s, {rate / 1e12:.1f} TFLOP/s per device, MFU {rate / 1e9:.1%}"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", CHIPS["v5e"].flops),
        ("TPU v5p", CHIPS["v5p"].flops),
        ("TPU v6 lite", CHIPS["v6e"].flops),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak_flops_by_device_kind(kind, peak):
    device = types.SimpleNamespace(device_kind=kind)
    assert peak_flops([device]) == peak
    assert peak_flops([device, device]) == (None if peak is None else 2 * peak)
    assert peak_flops([device, types.SimpleNamespace(device_kind="cpu")]) is None
