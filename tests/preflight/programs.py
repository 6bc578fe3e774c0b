"""Programs as compilers print them, and what they run on, for the tests of preflight."""

import types

import numpy as np

from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.instructions import Instruction

# Nested loops with 3 and 5 iterations, reduced from the output of the TPU compiler.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p.1: (s32[], bf16[8,16], bf16[16,4])) -> (s32[], bf16[8,16], bf16[16,4]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %w.1 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=2
  %y.1 = f32[8,4]{1,0:T(8,128)} convolution(%x.1, %w.1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/while/body/dot"}
  %all = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%w.1), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}, metadata={op_name="jit(step)/while/body/gather"}
  %one.1 = s32[]{:T(128)} constant(1)
  %next.1 = s32[]{:T(128)} add(%i.1, %one.1)
  ROOT %t.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) tuple(%next.1, %x.1, %w.1)
}

%inner_condition (p.2: (s32[], bf16[8,16], bf16[16,4])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %bound.2 = s32[]{:T(128)} constant(5)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %less.2 = pred[]{:T(512)} compare(%i.2, %bound.2), direction=LT
}

%outer_body (p.3: (s32[], bf16[8,16], bf16[16,4])) -> (s32[], bf16[8,16], bf16[16,4]) {
  %p.3 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %x.3 = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p.3), index=1
  %reduced = bf16[8,16]{1,0:T(8,128)(2,1)} all-reduce(%x.3), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add.1
  %zero.3 = s32[]{:T(128)} constant(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %w.3 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.3), index=2
  %start.3 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) tuple(%zero.3, %x.3, %w.3)
  %while.3 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) while(%start.3), condition=%inner_condition, body=%inner_body
  %one.3 = s32[]{:T(128)} constant(1)
  %next.3 = s32[]{:T(128)} add(%i.3, %one.3)
  ROOT %t.3 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) tuple(%next.3, %x.3, %w.3)
}

%outer_condition (p.4: (s32[], bf16[8,16], bf16[16,4])) -> pred[] {
  %p.4 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %bound.4 = s32[]{:T(128)} constant(3)
  %i.4 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  ROOT %less.4 = pred[]{:T(512)} compare(%i.4, %bound.4), direction=LT
}

ENTRY %main (s.5: (s32[], bf16[8,16], bf16[16,4])) -> (s32[], bf16[8,16], bf16[16,4]) {
  %s.5 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  ROOT %while.5 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[16,4]{1,0:T(8,128)(2,1)S(1)}) while(%s.5), condition=%outer_condition, body=%outer_body
}
"""  # noqa: E501


def mesh(*slices, **sizes):
    """A fake mesh of TPUs. slices: the slice of each device (default: all in one slice)."""
    devices = np.empty(tuple(sizes.values()), object)
    for i in range(devices.size):
        devices.flat[i] = types.SimpleNamespace(slice_index=slices[i] if slices else 0, platform="tpu")
    return types.SimpleNamespace(devices=devices, axis_names=tuple(sizes), size=devices.size)


def instruction(attributes="", opcode="all-reduce", operands=(), type="f32[]"):
    return Instruction("i", opcode, type, operands, attributes, "main")


def program(*lines, before=""):
    """A program of one computation."""
    return parse(text_of(*lines, before=before))


def text_of(*lines, before=""):
    body = "".join(f"  {line}\n" for line in lines)
    return f"{before}ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}}}\n"


def origin(name):
    return f'metadata={{op_name="jit(step)/{name}" source_file="/y/mythos_jax/ops/a.py" source_line=5}}'
