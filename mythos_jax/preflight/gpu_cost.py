"""The cost per GPU of kernels that do not report their own: cuDNN's attention, and the grouped products of
ops/grouped_triton.py. What several programs of a kernel read at about the same time is counted once: it is in the L2
cache."""

import math

from mythos_jax.ops import grouped_triton
from mythos_jax.ops.expectations import expected_rows
from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Array, Instruction, UnknownHloError

# By custom-call target, how often the kernel multiplies queries, keys or values with scores: forward, scores and
# weighted values; backward, the scores again and the gradients of queries, keys, values and weights.
_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
_TRITON = "__gpu$xla.gpu.triton"
TARGETS = {*_ATTENTION, _TRITON}
# cuDNN skips blocks of this size above the diagonal.
_BLOCK = 128


def gpu_kernel_cost(module: Module, instruction: Instruction, target: str) -> tuple[float, float]:
    """FLOPs of a run, and bytes from and to HBM, of a custom call to one of TARGETS.

    Raises UnknownHloError for a kernel that is not known here.
    """
    operands = [module.operand(instruction, i).arrays[0] for i in range(len(instruction.operands))]
    if target in _ATTENTION:
        return _attention(operands, instruction, _ATTENTION[target])
    if grouped_triton.PRODUCT in instruction.op_name:
        return _grouped_product(operands, instruction)
    if grouped_triton.OUTER in instruction.op_name:
        return _grouped_outer(operands, instruction)
    raise UnknownHloError("cost of a kernel", str(instruction))


def _attention(operands: list[Array], instruction: Instruction, products: int) -> tuple[float, float]:
    """Causal. The first operands are queries [B, T, H, K] and keys [B, S, G, K]."""
    (B, T, H, K), S = operands[0].shape, operands[1].shape[1]
    blocks = -(-T // _BLOCK)
    visited = (blocks + 1) / (2 * blocks)
    moved = sum(array.bytes for array in (*operands, *instruction.arrays))
    return products * 2.0 * B * H * T * S * K * visited, float(moved)


def _grouped_product(operands: list[Array], instruction: Instruction) -> tuple[float, float]:
    x, w, tiles = operands[:3]
    (E, *_), (R, columns) = w.shape, instruction.arrays[0].shape
    depth = x.shape[1]
    m = grouped_triton.product_blocks(R, w.shape, columns == w.shape[1], x.itemsize).rows
    mean = _rows(instruction, R) / E
    # Half of each expert's last tile is wasted on average; with few rows, it is whether an expert has any.
    visited = min(tiles.shape[1], E * (mean / m + 0.5 if mean > m / 2 else 1 - math.exp(-mean)))
    read = visited * m * (depth + columns) * x.itemsize + min(E, visited) * depth * columns * w.itemsize
    return 2.0 * visited * m * depth * columns, read


def _grouped_outer(operands: list[Array], instruction: Instruction) -> tuple[float, float]:
    x, y, sums = operands[0], operands[1], operands[3:]
    (R, D), F, (result,) = x.shape, y.shape[1], instruction.arrays
    k = grouped_triton.outer_blocks(D, F, x.itemsize).summed
    rows = _rows(instruction, R)
    moved = rows * (D + F) * x.itemsize + result.bytes + sum(array.bytes for array in sums)
    return 2.0 * (rows + result.shape[0] * k / 2) * D * F, moved


def _rows(instruction: Instruction, R: int) -> int:
    """How many of the rows belong to an expert."""
    expected = expected_rows(instruction.op_name)
    return R if expected is None else min(R, expected)
