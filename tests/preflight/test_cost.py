"""What instructions cost: bytes from and to memory, FLOPs, and seconds."""

import dataclasses

import pytest

from mythos_jax.chips import CHIPS
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.hlo import parse
from tests.preflight.programs import PROGRAM, program


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


def test_a_fusion_that_is_started_costs_what_it_would_at_once():
    """As XLA for GPUs prints a slice, and an update in place, that run beside what follows."""
    buffer, row = "f32[64,8]{1,0}", "f32[1,8]{1,0}"
    update = (
        f"%update (p: {buffer}, u: {row}, i: s32[]) -> {buffer} {{\n  %p = {buffer} parameter(0)\n"
        f"  %u = {row} parameter(1)\n  %i = s32[] parameter(2)\n"
        f"  ROOT %new = {buffer} dynamic-update-slice(%p, %u, %i, %i)\n}}\n\n"
    )
    module = program(
        f"%x = {buffer} parameter(0)", "%k = s32[] parameter(1)",
        f"%s = (({buffer}, s32[]), {row}, u32[]) fusion-start(%x, %k), kind=kLoop, calls=%inner",
        f"%row = {row} fusion-done(%s)",
        f"%t = (({buffer}, {row}, s32[]), {buffer}, u32[]) fusion-start(%x, %row, %k), kind=kLoop, calls=%update",
        f"ROOT %d = {buffer} fusion-done(%t)",
        before=INNER + update,
    )  # fmt: skip
    assert cost(module).hbm_bytes == (2 + 2) * 8 * 4


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


def test_only_hbm_traffic_is_counted():
    """The weights of PROGRAM are in fast memory, S(1); the product reads x from HBM and writes y, in float32, to it."""
    gather, product = 15 * 16 * 16 * 2, 15 * (8 * 16 * 2 + 8 * 4 * 4)
    assert cost(parse(PROGRAM)).hbm_bytes == gather + product + 3 * 2 * 8 * 16 * 2


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
