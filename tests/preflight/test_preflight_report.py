"""The report: causes, days and price, and what is refused before anything is compiled."""

import dataclasses

import jax
import pytest

from mythos_jax.chips import CHIPS, GIB
from mythos_jax.config import Config, MeshConfig, TrainingConfig
from mythos_jax.errors import ConfigError
from mythos_jax.preflight import compile as preflight_compile
from mythos_jax.preflight.compile import compile_train
from mythos_jax.preflight.program import Program
from mythos_jax.preflight.report import make_report
from mythos_jax.preflight.text import report_text
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import make_mesh
from tests.preflight.programs import origin, text_of

PRODUCT = "f32[8,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"

STEP = (
    "%x = f32[8,64]{1,0} parameter(0)",
    "%w = f32[64,8]{1,0} parameter(1)",
    f"%a = {PRODUCT}, {origin('jvp(Mythos.loop)/layer_0/moe/expect_rows_8/dot_general')}",
    f"%b = {PRODUCT}, {origin('jvp(Mythos.loop)/layer_1/moe/dot_general')}",
    f"ROOT %y = f32[8,8]{{1,0}} add(%a, %b), {origin('transpose(jvp())/while/body/add_any')}",
)


@pytest.fixture
def report():
    config = Config(name="c", training=TrainingConfig(steps=1000, batch_size=8))
    step = Program(make_mesh(config.mesh, jax.devices()[:1]), {"parameters": {}}, text=text_of(*STEP), temporaries=GIB)
    return make_report(config, parse_topology("v5e:1x1"), step)


def test_instructions_of_one_origin_are_one_cause(report):
    """Layers that differ in their number alone are one origin."""
    chip, (product, addition) = report.topology.chip, report.causes
    assert (product.what, product.phase, product.part) == ("dot f32[8,8]", "forward", "layer_*/moe/dot_general")
    assert (product.source, product.count, product.runs) == ("ops/a.py:5", 2, 1)
    assert (product.flops, product.hbm_bytes) == (2 * 2 * 8 * 8 * 64, 2 * 4 * (2 * 8 * 64 + 8 * 8))
    assert (addition.phase, addition.part, addition.hbm_bytes) == ("backward", "add_any", 3 * 4 * 8 * 8)
    assert report.sum_seconds == pytest.approx((product.hbm_bytes + addition.hbm_bytes) / chip.hbm_bandwidth)
    text = report_text(report, top=1)
    assert "The 1 largest causes, of 2" in text
    assert "2 x 1       dot f32[8,8], forward layer_*/moe/dot_general ops/a.py:5" in text
    assert "add_any" not in text
    assert [cause["count"] for cause in report.as_dict(top=5)["causes"]] == [2, 1]
    assert "causes" not in report.as_dict()


def test_days_and_price_of_the_run(report):
    """With the bound that is reported for a step; 1000 steps on one chip."""
    report = dataclasses.replace(report, sum_seconds=7200.0)
    assert (report.step_seconds, report.days, report.chip_hours) == (7200, pytest.approx(83.33, abs=0.01), 2000)
    assert (
        "1,000 steps take at least 83.3 days at full depth, 2,000 chip-hours, 2,400 at 1.2 per chip-hour"
        in report_text(report, price=1.2)
    )
    assert report.as_dict(price=1.2)["run"] == {
        "steps": 1000, "days": report.days, "chip_hours": 2000, "price": 2400
    }  # fmt: skip
    assert "price" not in report.as_dict()["run"]
    two = dataclasses.replace(report, mesh={"data": 2}, sum_seconds=1.0)
    assert "take at least 0.3 hours at full depth, 1 chip-hours" in report_text(two)
    assert report.utilisation == pytest.approx(report.flops["model"] / 7200 / CHIPS["v5e"].flops)


def test_what_train_refuses_is_refused(monkeypatch):
    """The config and the mesh are asked as `mythos train` asks them, before anything is compiled."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(preflight_compile, "_mesh", lambda config, topology: mesh)
    monkeypatch.setattr(preflight_compile, "jitted_step", lambda config: pytest.fail("it was compiled"))
    config = Config(training=TrainingConfig(steps=10, profile_steps=(20, 30)))
    with pytest.raises(ConfigError, match=r"training.profile_steps: got .*allowed: steps up to training.steps, 10"):
        compile_train(config, parse_topology("v5e:1x1"))


def test_links_and_devices_have_the_names_of_their_kind(report):
    """A GPU's are NVLink and the network; a chip that is two devices is paid for once."""
    step = Program(make_mesh(MeshConfig(), jax.devices()[:1]), {"parameters": {}}, text=text_of(*STEP))
    gpu = make_report(Config(name="c"), parse_topology("h100:1"), step)
    assert list(gpu.seconds) == ["compute", "HBM", "NVLink", "network"]
    assert "step on h100:1 (1 GPU)" in report_text(gpu)
    assert list(report.seconds) == ["compute", "HBM", "ICI", "DCN"]
    two_each = dataclasses.replace(report.topology, chip=dataclasses.replace(report.topology.chip, devices=2))
    halves = dataclasses.replace(report, topology=two_each, mesh={"fsdp": 8}, sum_seconds=3600.0)
    assert (halves.devices, halves.chips, halves.chip_hours) == (8, 4, 4 * 1000)
    assert halves.utilisation == pytest.approx(report.flops["model"] / 3600 / (8 * CHIPS["v5e"].flops))
    assert "(4 chips, 8 devices)" in report_text(halves)
