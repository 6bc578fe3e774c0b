"""Throughput and goodput against a clock that is set by hand."""

import dataclasses
import json
import types

import pytest

from mythos_jax.chips import CHIPS, peak_flops
from mythos_jax.flops import training_flops
from mythos_jax.sharding import make_mesh
from mythos_jax.training import metrics
from mythos_jax.training.metrics import Goodput, RunLog, Throughput


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


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
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens_per_second"] for row in rows] == [128.0] * 4
    assert rows[-1]["goodput"] == pytest.approx(4 / 64, abs=1e-4)


def test_steps_that_are_read_together_share_their_rate(config, clock, tmp_path):
    """Steps of 1 s each, of which the second and third are read at the same moment."""
    with RunLog(config, make_mesh(config.mesh), tmp_path, start=0, progress=False) as log:
        for steps in [(1,), (2, 3), (4,), ()]:
            clock.now += len(steps)
            log.steps([(step, {"loss": 1.0, "tokens": 128.0, "mean_loops": 2.0}) for step in steps])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {(row["tokens_per_second"], row["goodput"]) for row in rows} == {(128.0, 1.0)}
    assert log.last == rows[-1]


def test_goodput_is_the_fraction_of_time_in_steps(clock):
    goodput = Goodput()
    assert goodput.fraction() == 0
    for seconds in (7, 1, 1):  # the first step waits for the compiler
        clock.now += seconds
        goodput.add(1)
    clock.now += 1
    assert goodput.fraction() == pytest.approx(3 / 10)


def test_the_log_reports_flops_at_the_depth_that_was_trained(config, clock, tmp_path):
    """Two steps in two seconds on a device whose peak is known."""
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=3))
    (device,) = make_mesh(config.mesh).devices.flat
    with RunLog(config, make_mesh(config.mesh), tmp_path, start=1, progress=False) as log:
        log._throughput = Throughput(peak_flops=1e9)
        for step, loops in [(2, 2.0), (3, 1.5)]:
            clock.now += 1
            log.steps([(step, {"loss": 1.0, "tokens": 128.0, "mean_loops": loops})])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
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
