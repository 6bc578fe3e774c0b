"""Reading HLO: how often instructions run, where they come from, and what is not known."""

import re

import pytest

from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.instructions import UnknownHloError
from tests.preflight.programs import PROGRAM, program


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
