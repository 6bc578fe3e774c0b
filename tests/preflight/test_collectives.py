"""Collectives: their axes, and the bytes that a chip sends."""

import pytest

from mythos_jax.preflight.collectives import bytes_sent, read_collectives, replica_groups
from mythos_jax.preflight.hlo import parse
from tests.preflight.programs import PROGRAM, instruction, mesh


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
