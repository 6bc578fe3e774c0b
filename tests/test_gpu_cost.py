"""What kernels on NVIDIA GPUs cost, read from a program as the compiler prints it, reduced; more in tests_gpu/."""

import pytest

from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.instructions import UnknownHloError

# Attention of 2 x 4 heads over 1,024 positions, 96 wide. 4 experts of 512 x 1024, of whose 2,048 rows 1,600 are real.
PROGRAM = """HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[2,1024,4,96], x: bf16[2048,512]) -> bf16[2048,1024] {
  %q = bf16[2,1024,4,96]{3,2,1,0} parameter(0)
  %x = bf16[2048,512]{1,0} parameter(1)
  %y = bf16[2048,1024]{1,0} parameter(2)
  %w = bf16[4,512,1024]{2,1,0} parameter(3)
  %tiles = s32[3,19]{1,0} parameter(4)
  %bounds = s32[2,4]{1,0} parameter(5)
  %sums = f32[4,512,1024]{2,1,0} parameter(6)
  KERNEL
}
"""
FORWARD = """%a = (bf16[2,4,1024,96]{3,1,2,0}, f32[2,4,1024]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/fwd"}, backend_config={"fmha_scale": 0.1}"""
BACKWARD = FORWARD.replace("fmhaSoftmax", "fmhaSoftmaxBackward")
PRODUCT = """%p = bf16[2048,1024]{1,0} custom-call(%x, %w, %tiles), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(step)/expect_rows_1600/grouped_product/pallas_call"}, \
backend_config={grid_x = 4 : i32, ir = "ML\\EFR\\0D(calls=%w\\07{", name = "grouped_product"}"""
OUTER = """%o = f32[4,512,1024]{2,1,0} custom-call(%x, %y, %bounds, %sums), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(step)/expect_rows_1600/grouped_outer/pallas_call"}"""
CAUSAL = 2 * 4 * 1024**2 * 9 / 16  # scores in blocks of 128 up to the diagonal


@pytest.mark.parametrize(
    ("kernel", "flops", "moved"),
    [
        (FORWARD, 2 * 2 * CAUSAL * 96, 4 * 2 * 2 * 1024 * 4 * 96 + 4 * 2 * 4 * 1024),
        (BACKWARD, 5 * 2 * CAUSAL * 96, 4 * 2 * 2 * 1024 * 4 * 96 + 4 * 2 * 4 * 1024),
        # Tiles of 128 rows: 12.5 of them, and a half more of each expert.
        (PRODUCT, 2 * 14.5 * 128 * 512 * 1024, 2 * (14.5 * 128 * (512 + 1024) + 4 * 512 * 1024)),
        # Sums of 64 rows at a time; they are read and written.
        (OUTER, 2 * (1600 + 4 * 32) * 512 * 1024, 2 * 1600 * (512 + 1024) + 2 * 4 * 4 * 512 * 1024),
    ],
)
def test_kernels_are_counted_by_their_blocks(kernel, flops, moved):
    counted = cost(parse(PROGRAM.replace("KERNEL", kernel)))
    assert counted.flops == flops
    assert counted.hbm_bytes == moved
    assert counted.uncounted == ()


@pytest.mark.parametrize(
    "kernel", [PRODUCT.replace("grouped_product/pallas", "other/pallas"), FORWARD.replace("$fmhaSoftmax", "$conv")]
)
def test_a_kernel_that_is_not_known_is_an_error(kernel):
    with pytest.raises(UnknownHloError, match="unknown cost of a kernel"):
        cost(parse(PROGRAM.replace("KERNEL", kernel)))
