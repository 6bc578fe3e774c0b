"""What kernels and the compiler's custom calls cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.preflight import megablox_cost
from mythos_jax.preflight.cost import Cost, cost, matmul_flops
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.instructions import UnknownHloError
from tests.preflight.programs import instruction, program


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


def test_the_cost_of_a_kernel_is_what_it_reports():
    attributes = 'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"123","x":"4"}}'
    assert matmul_flops(None, instruction(attributes, opcode="custom-call")) == 123


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
