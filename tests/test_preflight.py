"""Preflight without a TPU compiler: topologies, reading HLO, counting bytes and FLOPs. tests_tpu/ has the rest."""

import dataclasses
import importlib.util
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from mythos_jax import cli
from mythos_jax.chips import CHIPS, GIB
from mythos_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from mythos_jax.errors import ConfigError
from mythos_jax.preflight import compile as preflight_compile
from mythos_jax.preflight import megablox_cost
from mythos_jax.preflight.buffers import peak_buffers
from mythos_jax.preflight.collectives import bytes_sent, read_collectives, replica_groups
from mythos_jax.preflight.compile import compile_train
from mythos_jax.preflight.cost import Cost, cost, matmul_flops
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.instructions import Instruction, UnknownHloError
from mythos_jax.preflight.program import Program, read_refusal
from mythos_jax.preflight.report import make_report
from mythos_jax.preflight.text import report_text
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import make_mesh

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


def test_instructions_are_counted_as_often_as_their_loops_run():
    program = parse(PROGRAM)
    assert {name: runs for name, runs in program.runs.items() if "body" in name} == {"outer_body": 3, "inner_body": 15}
    # A product of 8 x 16 and 16 x 4; a multiply-add counts as two.
    assert cost(program).flops == 15 * 2 * 8 * 16 * 4


@pytest.mark.parametrize(("start", "step", "bound", "trips"), [(0, 2, 5, 3), (0, 2, 6, 3), (1, 1, 5, 4), (2, 3, 8, 2)])
def test_loops_that_start_late_or_count_by_more_than_one(start, step, bound, trips):
    """Collective matrix products count by 2, for instance."""
    program = PROGRAM.replace("%bound.2 = s32[]{:T(128)} constant(5)", f"%bound.2 = s32[]{{:T(128)}} constant({bound})")
    program = program.replace("%one.1 = s32[]{:T(128)} constant(1)", f"%one.1 = s32[]{{:T(128)}} constant({step})")
    program = program.replace("%zero.3 = s32[]{:T(128)} constant(0)", f"%zero.3 = s32[]{{:T(128)}} constant({start})")
    assert parse(program).runs["inner_body"] == 3 * trips


def test_the_compilers_own_trip_count_comes_first():
    loop = "condition=%inner_condition, body=%inner_body"
    known = PROGRAM.replace(loop, loop + ', backend_config={"known_trip_count":{"n":"9"}}')
    assert parse(known).runs["inner_body"] == 3 * 9


def test_trip_counts_that_are_not_constant():
    """The recurrence runs `traced_depth` times, the head `traced_chunks` times, other loops once: also one whose bound
    is the largest integer."""
    bound = "  %bound.2 = s32[]{:T(128)} constant(5)\n"
    traced = PROGRAM.replace(bound, "  %bound.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0\n")
    assert traced != PROGRAM
    loop = "while(%start.3), condition=%inner_condition, body=%inner_body"
    named = traced.replace(loop, loop + ', metadata={op_name="jit(step)/jvp(Mythos.loop)/recurrence/while"}')
    assert parse(traced, traced_depth=7).runs["inner_body"] == 3
    assert parse(named, traced_depth=7).runs["inner_body"] == 3 * 7
    for scope in ("jvp(counted_chunks)", "transpose(jvp(counted_chunks))"):
        head = traced.replace(loop, loop + f', metadata={{op_name="jit(step)/{scope}/while"}}')
        assert parse(head, traced_depth=7, traced_chunks=4).runs["inner_body"] == 3 * 4
    for expectation, trips in (("expect_trips_0", 0), ("expect_trips_2", 2), ("transpose(jvp(expect_trips_2))", 2)):
        rounds = traced.replace(loop, loop + f', metadata={{op_name="jit(step)/{expectation}/while"}}')
        assert parse(rounds).runs["inner_body"] == 3 * trips
        assert not parse(rounds).open_loops()
    inside = traced.replace(loop, loop + ', metadata={op_name="jit(step)/expect_trips_2/while/body/while"}')
    assert [i.name for i in parse(inside).open_loops()] == ["while.3"]
    assert parse(inside).runs["inner_body"] == 3
    sampler = PROGRAM.replace(bound, bound.replace("(5)", "(2147483647)"))
    assert parse(sampler, traced_depth=7).runs["inner_body"] == 3


def test_collectives_have_bytes_axes_and_slices():
    """The gather spans 4 chips on the inner axis; the reduction spans 2 on the outer axis, in different slices."""
    reduce, gather = sorted(
        read_collectives(parse(PROGRAM), mesh(*[0] * 4, *[1] * 4, data=2, fsdp=4)), key=lambda c: c.runs
    )
    assert (gather.kind, gather.axes, gather.runs) == ("all-gather", ("fsdp",), 15)
    assert (gather.ici, gather.dcn) == (15 * 3 * 16 * 4 * 2, 0)
    assert (reduce.kind, reduce.axes, reduce.runs) == ("all-reduce", ("data",), 3)
    assert (reduce.ici, reduce.dcn) == (0, 3 * 2 * (8 * 16 * 2) / 2)


def test_ragged_all_to_all_is_counted_for_an_even_load():
    """To the experts and back: 8 rows of 16 bfloat16 per chip, three quarters of them to other chips; room for 32."""
    sizes = "".join(f"  %s.{i} = s32[4] parameter({i + 2})\n" for i in range(4))
    for sent, room in [(8, 32), (32, 8)]:
        text = (
            f"ENTRY %main (x: bf16[{sent},16], y: bf16[{room},16]) -> bf16[{room},16] {{\n"
            f"  %x = bf16[{sent},16] parameter(0)\n  %y = bf16[{room},16] parameter(1)\n{sizes}"
            f"  ROOT %z = bf16[{room},16] ragged-all-to-all(%x, %y, %s.0, %s.1, %s.2, %s.3), "
            "replica_groups={{0,1,2,3},{4,5,6,7}}\n}\n"
        )
        (collective,) = read_collectives(parse(text), mesh(*[0] * 8, data=2, expert=4))
        assert (collective.axes, collective.ici, collective.dcn) == (("expert",), 3 / 4 * 8 * 16 * 2, 0)


def test_the_pieces_of_one_collective_are_counted_once():
    """The compiler may spread a gather over several fusions; the pieces have the same chain."""
    line = next(line for line in PROGRAM.splitlines() if " all-gather(" in line)
    piece = line.replace("channel_id=1", 'channel_id=1, frontend_attributes={chain_id="7"}')
    for program, count in [
        (PROGRAM.replace(line, piece + "\n" + piece.replace("%all ", "%all.2 ")), 1),
        (PROGRAM.replace(line, line + "\n" + line.replace("%all ", "%all.2 ")), 2),
    ]:
        collectives = read_collectives(parse(program), mesh(*[0] * 8, data=2, fsdp=4))
        assert sum(c.kind == "all-gather" for c in collectives) == count


def test_transfers_between_slices_are_counted():
    """An all-reduce between two slices as the TPU compiler prints it: 8 x 16 bfloat16 per chip, in the outer loop."""
    line = next(line for line in PROGRAM.splitlines() if " all-reduce(" in line)
    sent = (
        "  %send.1 = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%x.3, %after), channel_id=4, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    two_slices = mesh(*[0] * 4, *[1] * 4, data=2, fsdp=4)
    between, _ = sorted(read_collectives(parse(PROGRAM.replace(line, sent)), two_slices), key=lambda c: c.runs)
    assert (between.kind, between.axes, between.runs) == ("all-reduce", ("data",), 3)
    assert (between.ici, between.dcn) == (0, 3 * 2 * (8 * 16 * 2) / 2)


def program(*lines, before=""):
    """A program of one computation."""
    return parse(text_of(*lines, before=before))


def text_of(*lines, before=""):
    body = "".join(f"  {line}\n" for line in lines)
    return f"{before}ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}}}\n"


def test_a_started_slice_moves_the_slice():
    module = program(
        "%x = bf16[10240,2048]{1,0} parameter(0)",
        "%s = ((bf16[10240,2048]{1,0}), bf16[2560,2048]{1,0:S(1)}, s32[]) slice-start(%x), slice={[0:2560], [0:2048]}",
        "ROOT %d = bf16[2560,2048]{1,0:S(1)} slice-done(%s)",
    )
    assert cost(module).hbm_bytes == 2560 * 2048 * 2
    copy = program(
        "%x = bf16[64,8]{1,0} parameter(0)",
        "%s = (bf16[64,8]{1,0:S(1)}, bf16[64,8]{1,0}, u32[]) copy-start(%x)",
        "ROOT %d = bf16[64,8]{1,0:S(1)} copy-done(%s)",
    )
    assert cost(copy).hbm_bytes == 64 * 8 * 2


INNER = (
    "%inner (p: f32[64,8], i: s32[]) -> f32[1,8] {\n  %p = f32[64,8]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
    "  ROOT %part = f32[1,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}\n}\n\n"
)
OUTER = INNER + (
    "%outer (q: f32[8,64], r: f32[64,8], j: s32[]) -> f32[1,8] {\n  %q = f32[8,64]{1,0} parameter(0)\n"
    "  %r = f32[64,8]{1,0} parameter(1)\n  %j = s32[] parameter(2)\n  %same = f32[64,8]{1,0} bitcast(%q)\n"
    "  %a = f32[1,8]{1,0} fusion(%same, %j), kind=kLoop, calls=%inner\n"
    "  %b = f32[1,8]{1,0} dynamic-slice(%r, %j, %j), dynamic_slice_sizes={1,8}\n"
    "  ROOT %sum = f32[1,8]{1,0} add(%a, %b)\n}\n\n"
)


def test_a_fusion_reads_the_parts_that_it_uses():
    """Also through a bitcast and a fusion inside the fusion."""
    module = program(
        "%x = f32[8,64]{1,0} parameter(0)", "%y = f32[64,8]{1,0} parameter(1)", "%j = s32[] parameter(2)",
        "ROOT %f = f32[1,8]{1,0} fusion(%x, %y, %j), kind=kLoop, calls=%outer",
        before=OUTER,
    )  # fmt: skip
    assert cost(module).hbm_bytes == 3 * 8 * 4


def test_an_operand_given_twice_to_a_fusion_is_read_once():
    adds = (
        "%adds (p: f32[64,8], q: f32[64,8]) -> f32[64,8] {\n  %p = f32[64,8]{1,0} parameter(0)\n"
        "  %q = f32[64,8]{1,0} parameter(1)\n  ROOT %sum = f32[64,8]{1,0} add(%p, %q)\n}\n\n"
    )
    for operands, arrays in (("%x, %x", 2), ("%x, %y", 3)):
        module = program(
            "%x = f32[64,8]{1,0} parameter(0)", "%y = f32[64,8]{1,0} parameter(1)",
            f"ROOT %f = f32[64,8]{{1,0}} fusion({operands}), kind=kLoop, calls=%adds",
            before=adds,
        )  # fmt: skip
        assert cost(module).hbm_bytes == arrays * 64 * 8 * 4


def test_the_sum_takes_the_larger_of_compute_and_memory_for_each_instruction():
    """A product bound by compute and a copy bound by memory: they do not overlap, but a copy ahead of its use does."""
    chip = dataclasses.replace(CHIPS["v5e"], flops=1.0, hbm_bandwidth=1.0)
    lines = ["%x = f32[8,64]{1,0} parameter(0)", "%w = f32[64,8]{1,0} parameter(1)"]
    product = "%y = f32[8,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    flops, moved = 2 * 8 * 8 * 64, 2 * 8 * 8 * 4
    both = cost(program(*lines, product, "ROOT %z = f32[8,8]{1,0} copy(%y)"))
    assert (both.flops, both.seconds(chip)) == (flops, flops + moved)
    start = "%s = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]) copy-start(%y)"
    ahead = cost(program(*lines, product, start, "ROOT %z = f32[8,8]{1,0:S(1)} copy-done(%s)"))
    assert ahead.seconds(chip) == flops
    slow = dataclasses.replace(chip, hbm_bandwidth=0.1)
    assert ahead.seconds(slow) == pytest.approx(ahead.hbm_bytes / 0.1)


@pytest.mark.parametrize(
    ("left", "right", "kind"),
    [("s8", "s8", "int8"), ("f8e5m2", "f8e4m3fn", "fp8"), ("bf16", "s8", None), ("bf16", "bf16", None)],
)
def test_products_in_8_bits_take_half_the_time_where_a_chip_has_units_for_them(left, right, kind):
    body = f"""
%product (p.0: {left}[8,64], p.1: {right}[64,8]) -> f32[8,8] {{
  %p.0 = {left}[8,64]{{1,0}} parameter(0)
  %p.1 = {right}[64,8]{{1,0}} parameter(1)
  ROOT %d = f32[8,8]{{1,0}} dot(%p.0, %p.1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""
    lines = [f"%x = {left}[8,64]{{1,0}} parameter(0)", f"%w = {right}[64,8]{{1,0}} parameter(1)"]
    fused = "ROOT %y = f32[8,8]{1,0} fusion(%x, %w), kind=kOutput, calls=%product"
    found = cost(program(*lines, fused, before=body))
    flops = 2 * 8 * 8 * 64
    assert (found.flops, found.narrow_flops) == (flops, flops if kind else 0)
    for name, kinds in {"v5e": ["int8"], "h100": ["int8", "fp8"]}.items():
        chip = dataclasses.replace(CHIPS[name], flops=1.0)
        assert found.compute_seconds(chip) == (flops / 2 if kind in kinds else flops)


def gmm_call(rows, groups, tile, depth, width, real=None, gradient=False):
    """A module of one Megablox kernel as the TPU compiler prints it, without its program."""
    visits = rows // tile + groups - 1
    inputs = [
        "s32[]",
        f"s32[{groups + 1}]",
        f"s32[{visits}]",
        f"s32[{visits}]",
        "s32[1]",
        f"bf16[{rows},{depth}]{{1,0}}",
    ]
    inputs += [f"bf16[{rows},{width}]{{1,0}}" if gradient else f"bf16[{groups},{depth},{width}]{{2,1,0}}"]
    out = f"bf16[{groups},{depth},{width}]{{2,1,0}}" if gradient else f"bf16[{rows},{width}]{{1,0}}"
    lines = [f"%p.{i} = {type_} parameter({i})" for i, type_ in enumerate(inputs)]
    names = ", ".join(f"%p.{i}" for i in range(len(inputs)))
    scope = f"expect_rows_{real}/" if real else ""
    call = (
        f'custom-call({names}), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/{scope}pallas_call"}}'
    )
    return program(*lines, f"ROOT %y = {out} {call}")


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("real", [8192, 10000])
def test_grouped_products_count_whole_tiles_for_each_expert(monkeypatch, gradient, real):
    """The truth is Megablox's own list of visits, on average over loads whose expected size is the same for all."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

    rows, groups, tile, depth, width = 10240, 16, 512, 2048, 4096
    sizes = np.random.default_rng(0).multinomial(2 * real, [1 / 32] * 32, size=100)[:, :groups]

    @jax.jit
    @jax.vmap
    def visits(sizes):
        arguments = dict(m=rows, tm=tile, start_group=jnp.array(0), num_nonzero_groups=groups)
        return make_group_metadata(group_sizes=sizes, visit_empty_groups=gradient, **arguments)[1]

    matrices = [(tile, 1024), (1, 1024, 1024), (tile, 1024)]
    matrices = [matrices[0], matrices[2], matrices[1]] if gradient else matrices
    monkeypatch.setattr(megablox_cost, "block_shapes", lambda _: [(17,), (35,), (35,), (1,), *matrices])
    counted = cost(gmm_call(rows, groups, tile, depth, width, real, gradient)).flops
    expected = float(visits(jnp.array(sizes, jnp.int32)).mean()) * tile * 2 * depth * width
    assert counted == pytest.approx(expected, rel=0.02)


def test_grouped_products_fetch_weights_once_if_a_tile_has_their_whole_depth(monkeypatch):
    rows, groups, tile, depth, width = 4096, 8, 512, 1024, 1024
    monkeypatch.setattr(megablox_cost, "block_shapes", lambda _: [(9,), (15,), (15,), (1,), *blocks])
    matrices, weights, visits = 2 * rows * (depth + width), 2 * groups * depth * width, 8 + 7 * 511 / 512
    blocks = [(tile, 1024), (1, 1024, 1024), (tile, 1024)]
    assert cost(gmm_call(rows, groups, tile, depth, width)).hbm_bytes == matrices + weights
    blocks = [
        (tile, 512),
        (1, 512, 512),
        (tile, 512),
    ]  # both are fetched at each visit, and rows for each half of width
    again = visits * 2 * (2 * tile * depth + depth * width)
    assert cost(gmm_call(rows, groups, tile, depth, width)).hbm_bytes == again + 2 * rows * width
    blocks = [(tile, 512), (tile, 512), (1, 512, 512)]
    whole = cost(gmm_call(rows, groups, tile, depth, width, gradient=True))
    assert whole.hbm_bytes == 2 * matrices + weights


def test_the_source_line_of_an_instruction():
    """The innermost one in this package."""
    files = ("/x/site-packages/jax/numpy.py", "/y/mythos_jax/ops/attention.py", "/y/mythos_jax/model/a.py")
    names = "".join(f'{i} "{file}"\n' for i, file in enumerate(files, 1))
    lines = "".join(f"{i} {{file_name_id={i} function_name_id=1 line={i}7 end_line=9}}\n" for i in (1, 2, 3))
    frames = "".join(f"{i} {{file_location_id={4 - i} parent_frame_id={i}}}\n" for i in (1, 2, 3))
    tables = f"FileNames\n{names}\nFileLocations\n{lines}\nStackFrames\n{frames}\n"
    module = program("ROOT %x = f32[8]{0} parameter(0), metadata={stack_frame_id=3}", before=tables)
    assert module.source(module.computations["main"][0]) == "ops/attention.py:27"
    plain = program('ROOT %x = f32[8]{0} parameter(0), metadata={source_file="/y/mythos_jax/ops/a.py" source_line=5}')
    assert plain.source(plain.computations["main"][0]) == "ops/a.py:5"


def test_only_hbm_traffic_is_counted():
    """The weights of PROGRAM are in fast memory, S(1); the product reads x from HBM and writes y, in float32, to it."""
    gather, product = 15 * 16 * 16 * 2, 15 * (8 * 16 * 2 + 8 * 4 * 4)
    assert cost(parse(PROGRAM)).hbm_bytes == gather + product + 3 * 2 * 8 * 16 * 2


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,2},{2,3}}", [[0, 1], [1, 2], [2, 3]]),
    ],
)
def test_replica_groups_in_every_notation(notation, groups):
    assert sorted(replica_groups(instruction(f"channel_id=1, {notation}, to_apply=%add"), 4)) == groups


def test_bytes_of_a_ring():
    """In each of the n - 1 steps of a ring, a chip sends 1 / n of the data, or for a gather its own part."""
    n, size = 8, 800
    assert bytes_sent("reduce-scatter", size, n) == ((n - 1) * size / n, 0)
    assert bytes_sent("all-gather", size / n, n) == ((n - 1) * size / n, 0)
    assert bytes_sent("all-reduce", size, n) == (2 * (n - 1) * size / n, 0)
    assert bytes_sent("all-to-all", size, n) == ((n - 1) * size / n, 0)
    # Two slices of 4 chips: a ring of 4 inside each slice, then a quarter of the data between the slices.
    assert bytes_sent("all-reduce", size, n, slices=2) == (2 * 3 / 4 * size, 2 * 1 / 2 * size / 4)
    assert bytes_sent("all-reduce", size, 1) == (0, 0)


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "flops"),
    [
        ("bf16[8,16]", "bf16[16,4]", "f32[8,4]", "dim_labels=bf_io->bf", 2 * 8 * 16 * 4),
        ("bf16[8,16]", "bf16[4,16]", "f32[8,4]", "dim_labels=bf_oi->bf", 2 * 8 * 16 * 4),
        # A batch of 64 products, as a window of which exactly one tap per output meets an element.
        (
            "bf16[64,32,8]", "bf16[64,32,16]", "bf16[64,8,16]",
            "window={size=64 stride=63 lhs_dilate=64}, dim_labels=0fb_0io->0bf", 2 * 64 * 32 * 8 * 16,
        ),
        # A real convolution: 6 outputs of 3 taps, one of which falls on the padding at each end.
        ("f32[6,1,5]", "f32[3,5,7]", "f32[6,1,7]", "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 2 * 16 * 5 * 7),
    ],
)  # fmt: skip
def test_flops_of_products(left, right, out, attributes, flops):
    text = (
        f"ENTRY %main (x: {left}, w: {right}) -> {out} {{\n  %x = {left} parameter(0)\n  %w = {right} parameter(1)\n"
        f"  ROOT %y = {out} convolution(%x, %w), {attributes}\n}}\n"
    )
    assert cost(parse(text)).flops == flops


def test_the_cost_of_a_kernel_is_what_it_reports():
    attributes = 'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"123","x":"4"}}'
    assert matmul_flops(None, instruction(attributes, opcode="custom-call")) == 123


@pytest.mark.parametrize(
    ("known", "unknown", "message"),
    [
        ("f32[8,4]{1,0:T(8,128)} convolution", "f32[8,4]{1,0:T(8,128)} ragged-dot", "unknown opcode 'ragged-dot'"),
        ("f32[8,4]{1,0:T(8,128)} convolution", "f32[8,4]{1,0:T(8,128)} dot-start", "unknown opcode 'dot-start'"),
        ("bf16[16,16]{1,0:T(8,128)(2,1)} all-gather", "q7[16,16] all-gather", "unknown dtype 'q7'"),
        ("f32[] add(%a, %b)", "f32[] 17", "unknown syntax"),
    ],
)
def test_unknown_hlo_is_an_error_that_names_it(known, unknown, message):
    assert known in PROGRAM
    with pytest.raises(UnknownHloError, match=re.escape(message)) as error:
        cost(parse(PROGRAM.replace(known, unknown)))
    assert "libtpu" in str(error.value)
    cost(parse(PROGRAM.replace(" all-gather(%w.1)", " copy-start(%w.1)")))


def test_a_kernel_without_a_known_cost_is_an_error():
    with pytest.raises(UnknownHloError, match="unknown cost of a kernel"):
        matmul_flops(None, instruction('custom_call_target="tpu_custom_call"', opcode="custom-call"))


def test_unknown_custom_calls_of_the_compiler_are_listed():
    text = (
        "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n"
        '  %y = f32[8] custom-call(%x), custom_call_target="ZeroCrop"\n'
        '  ROOT %z = f32[8] custom-call(%y), custom_call_target="SomethingNew"\n}\n'
    )
    assert cost(parse(text)) == Cost((), uncounted=("SomethingNew",))


# A kernel with metadata on several lines that does not report its cost: 4 x 4 blocks, of which it visits 10.
SPLASH = """HloModule jit_step

ENTRY %main (q: bf16[2,4,512,96], k: bf16[2,2,512,96], v: bf16[2,2,512,64], t: s8[1,4,4]) -> bf16[2,4,512,64] {
  %q = bf16[2,4,512,96]{3,2,1,0} parameter(0)
  %k = bf16[2,2,512,96]{3,2,1,0} parameter(1)
  %v = bf16[2,2,512,64]{3,2,1,0} parameter(2)
  %t = s8[1,4,4]{2,1,0} parameter(3)
  %kernel = bf16[2,4,512,64]{3,2,1,0} custom-call(%t, %t, %q, %k, %v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(step)/splash_mha_fwd_residuals/pallas_call"}
  ROOT %out = bf16[2,4,512,64]{3,2,1,0} copy(%kernel)
}
"""  # noqa: E501


def test_splash_attention_counts_the_blocks_it_visits():
    module = parse(SPLASH)
    assert [i.opcode for i in module.computations["main"]][-2:] == ["custom-call", "copy"]
    total = cost(module)
    assert total.flops == 2 * 2 * 4 * 512**2 * (96 + 64) * 10 / 16
    q, out, k, v = (2 * 512 * n for n in (2 * 4 * 96, 2 * 4 * 64, 2 * 2 * 96, 2 * 2 * 64))
    # Each block of keys is read for 2.5 blocks of queries on average; the last term is the copy.
    assert total.hbm_bytes == q + out + 2.5 * (k + v) + 2 * out


def origin(name):
    return f'metadata={{op_name="jit(step)/{name}" source_file="/y/mythos_jax/ops/a.py" source_line=5}}'


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
    assert "1,000 steps take at least 83.3 days, 2,000 chip-hours, 2,400 at 1.2 per chip-hour" in report_text(
        report, price=1.2
    )
    assert report.as_dict(price=1.2)["run"] == {
        "steps": 1000, "days": report.days, "chip_hours": 2000, "price": 2400
    }  # fmt: skip
    assert "price" not in report.as_dict()["run"]
    two = dataclasses.replace(report, mesh={"data": 2}, sum_seconds=1.0)
    assert "take at least 0.3 hours, 1 chip-hours" in report_text(two)
    assert report.utilisation == pytest.approx(report.flops["model"] / 7200 / CHIPS["v5e"].flops)


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
    assert report.causes
    text = report_text(report)
    assert "DOES NOT FIT: it needs 20.00 GiB" in text
    assert "The largest buffers at the peak" in text
    assert report.as_dict()["biggest"][0]["count"] == 1
    early = make_report(config, parse_topology("v5e:1x1"), Program(mesh, parameters, needed=20.0 * GIB))
    assert (early.fits, early.seconds, early.as_dict()["bound"]) == (False, {}, "")
    assert "DOES NOT FIT: it needs 20.00 GiB" in report_text(early)


def test_what_train_refuses_is_refused(monkeypatch):
    """The config and the mesh are asked as `mythos train` asks them, before anything is compiled."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(preflight_compile, "_mesh", lambda config, topology: mesh)
    monkeypatch.setattr(preflight_compile, "jitted_step", lambda config: pytest.fail("it was compiled"))
    config = Config(training=TrainingConfig(steps=10, profile_steps=(20, 30)))
    with pytest.raises(ConfigError, match=r"training.profile_steps: got .*allowed: steps up to training.steps, 10"):
        compile_train(config, parse_topology("v5e:1x1"))


def test_topologies():
    topology = parse_topology("v5p:4x4x8", slices=2)
    assert (topology.chip, topology.name) == (CHIPS["v5p"], "v5p:4x4x8 x 2")
    for name in ["v5e:3x3", "v5p:4x4", "v5e", "v100:8"]:
        with pytest.raises(ConfigError, match=r"allowed: .*v5[ep]:"):
            parse_topology(name)
    with pytest.raises(ConfigError, match="--slices: got 0"):
        parse_topology("v5e:4x4", slices=0)


def test_topologies_of_gpus(monkeypatch):
    """Nodes come before the GPUs of each. A program gets the part of the memory that jax reserves."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    topologies = [parse_topology(name) for name in ("h100:1", "h200:8", "a100:12x8")]
    assert [t.nodes for t in topologies] == [(1, 1), (1, 8), (12, 8)]
    assert topologies[0].chip.hbm_bytes == 0.75 * CHIPS["h100"].hbm_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert parse_topology("h100:1").chip.hbm_bytes == 0.9 * CHIPS["h100"].hbm_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ConfigError, match="XLA_PYTHON_CLIENT_MEM_FRACTION: got 'most', allowed: a number"):
        parse_topology("h100:1")
    monkeypatch.undo()
    for name in ["h100:3", "h100:2x4", "h100:0x8", "h100:"]:
        with pytest.raises(ConfigError, match=rf"--topology: got '{name}', allowed: h100:1, .* h100:Nx8 for N nodes"):
            parse_topology(name)
    with pytest.raises(
        ConfigError, match=r"--slices: got 2, allowed: 1 for GPUs, whose nodes are in the name: h100:2x8"
    ):
        parse_topology("h100:8", slices=2)


def test_the_command_rejects_wrong_input_with_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("name: c\n")
    assert cli.main(["compile", str(path), "--topology", "v9:1x1"]) == 2
    error = capsys.readouterr().err
    assert "v9:1x1" in error
    assert "v5e:16x16" in error
    assert error.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for topology, extra in [("v5e:2x2", "tpu"), ("h100:8", "cuda")]:
        assert cli.main(["compile", str(path), "--topology", topology]) == 2
        error = capsys.readouterr().err
        assert f"pip install 'mythos-jax[{extra}]'" in error
        assert error.count("\n") == 1
