"""What fills the memory of a program, and the advice for one that does not fit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from mythos_jax.chips import GIB
from mythos_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from mythos_jax.preflight.buffers import peak_buffers
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.program import Program, read_refusal
from mythos_jax.preflight.report import make_report
from mythos_jax.preflight.text import report_text
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import make_mesh
from tests.preflight.programs import origin


def test_out_of_memory_messages_are_read():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.51G of 15.75G hbm. Exceeded by 4.76G."
    assert read_refusal(message) == 20.51 * GIB
    short = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (446.61G) "
    assert read_refusal(short + "exceeds available HBM (15.75G).") == 446.61 * GIB
    assert math.isnan(read_refusal("RESOURCE_EXHAUSTED: Ran out of memory on HBM"))
    assert read_refusal("INTERNAL: something else") is None


# A loop that fills a stack of 4 activations, kept for the backward pass. The stack has three names in one place.
KEPT = f"""HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[4,1024])) -> (s32[], f32[4,1024]) {{
  %p = (s32[], f32[4,1024]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %stack = f32[4,1024]{{1,0}} get-tuple-element(%p), index=1
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %new = f32[1024]{{0}} broadcast(%i), {origin("jvp(Mythos.loop)/while/body/layer_0/mlp/tanh")}
  %row = f32[1,1024]{{1,0}} bitcast(%new)
  %filled = f32[4,1024]{{1,0}} dynamic-update-slice(%stack, %row, %i, %zero), {origin("jvp(Mythos.loop)/while/update")}
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[4,1024]{{1,0}}) tuple(%next, %filled)
}}

%condition (q: (s32[], f32[4,1024])) -> pred[] {{
  %q = (s32[], f32[4,1024]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(4)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}}

ENTRY %main (w: f32[2048]) -> f32[4,1024] {{
  %w = f32[2048]{{0}} parameter(0)
  %start = s32[] constant(0)
  %empty = f32[4,1024]{{1,0}} custom-call(), custom_call_target="AllocateBuffer"
  %state = (s32[], f32[4,1024]{{1,0}}) tuple(%start, %empty)
  %while = (s32[], f32[4,1024]{{1,0}}) while(%state), condition=%condition, body=%body
  %gathered = f32[8192]{{0}} all-gather(%w), replica_groups={{{{0}}}}, dimensions={{0}}
  %result = f32[4,1024]{{1,0}} get-tuple-element(%while), index=1
  ROOT %y = f32[4,1024]{{1,0}} copy(%result), {origin("transpose(jvp(Mythos.loop))/mlp/mul")}
}}
"""

LIVE = """HloLiveRange (max 12):
  BufferLiveRange:
    w{}:0-12
    empty{}:1-2
    while{1}:2-9
    p{1}:3-8
    new{}:4-6
    gathered{}:10-11
    y{}:10-12
  Live ranges at 4 (peak):
"""

ASSIGNMENT = """BufferAssignment:
allocation 0: size 8192, parameter 0, shape |f32[2048]| at ShapeIndex {}:
 value: <1 w @0> (size=8192,offset=0): f32[2048]{0}
allocation 1: size 36864, preallocated-temp:
 value: <2 empty @0> (size=16384,offset=0): f32[4,1024]{1,0}
 value: <3 while{1} (phi) @0> (size=16384,offset=0): f32[4,1024]{1,0}
 value: <4 p{1} (phi) @0> (size=16384,offset=0): f32[4,1024]{1,0}
 value: <5 new @0> (size=4096,offset=16384): f32[1024]{0}
 value: <6 gathered @0> (size=GATHERED,offset=16384): f32[8192]{0}
 value: <7 y @0> (size=16384,offset=0): f32[4,1024]{1,0}
allocation 2: size 99999999, color 1, preallocated-temp:
 value: <8 start @0> (size=99999999,offset=0): s32[]
"""


def kept(gathered):
    return dict(text=KEPT, live_ranges=LIVE, assignment=ASSIGNMENT.replace("GATHERED", str(gathered)))


def test_the_largest_buffers_at_the_peak():
    """A place in memory counts once, whatever its names; a stack is called after what fills it."""
    module = parse(KEPT)
    stack, weights, part = peak_buffers(module, LIVE, kept(0)["assignment"])
    assert (stack.bytes, stack.count, stack.type, stack.holds) == (16384, 1, "f32[4,1024]", "forward pass")
    assert (stack.part, stack.source) == ("layer_*/mlp/tanh", "ops/a.py:5")
    assert (weights.bytes, weights.holds) == (8192, "state")
    assert (part.bytes, part.holds, part.part) == (4096, "forward pass", "layer_*/mlp/tanh")
    gathered, *_ = peak_buffers(module, LIVE, kept(32768)["assignment"])
    assert (gathered.bytes, gathered.type, gathered.holds) == (32768, "f32[8192]", "gathered weights")
    assert peak_buffers(module, "", "") == []


@pytest.mark.parametrize(
    ("gathered", "changes", "advice"),
    [
        (0, {"remat": "none"}, "most of all 1 x f32[4,1024] of layer_*/mlp/tanh ops/a.py:5: set model.remat to full"),
        (0, {}, "values that the forward pass leaves for the backward pass take 0.0 GiB, most of all 1 x f32[4,1024]"),
        (0, {}, "raise training.grad_accumulation_steps (1; each chip processes 8 rows at a time)"),
        (32768, {}, "most of all 1 x f32[8192]: set mesh.gather to per_loop (it is once)"),
        (
            32768,
            {"remat": "none"},
            "most of all 1 x f32[8192]: set model.remat to full (it is none)",
        ),  # per_loop needs it
    ],
)
def test_a_program_that_does_not_fit_is_explained(gathered, changes, advice):
    """It is refused, and what the compiler wrote of it is read all the same: costs, and what fills the memory."""
    model = ModelConfig(**({"remat": "full"} | changes))
    config = Config(name="c", model=model, training=TrainingConfig(batch_size=8), mesh=MeshConfig(gather="once"))
    parameters = {
        "parameters": jax.ShapeDtypeStruct((GIB,), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    }
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = Program(mesh, parameters, needed=20.0 * GIB, **kept(gathered))
    report = make_report(config, parse_topology("v5e:1x1"), program)
    assert advice in report.advice
    assert (report.fits, report.needed, report.hbm["temporaries"]) == (False, 20 * GIB, 16 * GIB)
    silent = make_report(config, parse_topology("v5e:1x1"), dataclasses.replace(program, needed=math.nan))
    assert (silent.fits, silent.needed) == (False, sum(buffer.bytes for buffer in silent.biggest))
    assert report.causes
    text = report_text(report)
    assert "DOES NOT FIT: it needs 20.00 GiB" in text
    assert "The largest buffers at the peak" in text
    assert report.as_dict()["biggest"][0]["count"] == 1
    early = make_report(config, parse_topology("v5e:1x1"), Program(mesh, parameters, needed=20.0 * GIB))
    assert (early.fits, early.seconds, early.as_dict()["bound"]) == (False, {}, "")
    assert "DOES NOT FIT: it needs 20.00 GiB" in report_text(early)
