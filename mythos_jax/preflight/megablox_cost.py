"""The cost of Megablox (ops/megablox.py) per chip, from the tiles that it visits.

Its own estimate counts every row of the operand once, as if the groups ended where tiles end. The kernel multiplies a
whole tile of rows for each group that has a row in it. How many rows belong to a group is known at run time alone; the
program's author says what is expected (`expect_rows`), and the groups are taken to be equally large.
"""

from dataclasses import dataclass

from mythos_jax.ops.expectations import expected_rows
from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Array, Instruction
from mythos_jax.preflight.mosaic import block_shapes

# Operands before the matrices: the length of the grid, where groups begin, the group and the tile of each visit, and
# the first group.
_METADATA = 5


@dataclass(frozen=True)
class _Product:
    """A grouped product. groups, rows, depth, width: of [rows, depth] by [groups, depth, width], or for the gradient of
    weights (is_gradient), which sums over rows, of [rows, depth] by [rows, width]. tiles: of rows that hold rows of a
    group. visits: of these by groups. tile: its sizes along rows, depth and width."""

    operands: tuple[Array, ...]
    result: Array
    is_gradient: bool
    groups: int
    depth: int
    width: int
    tiles: float
    visits: float
    tile: tuple[int, int, int]


def is_megablox(module: Module, instruction: Instruction) -> bool:
    """Whether a kernel has the operands of Megablox."""
    arrays = [module.operand(instruction, i).arrays for i in range(len(instruction.operands))]
    if len(arrays) < _METADATA + 2 or any(len(a) != 1 for a in arrays[:_METADATA]):
        return False
    length, starts, groups, tiles, first = (a[0] for a in arrays[:_METADATA])
    are_integers = all(a.dtype == "s32" for a in (length, starts, groups, tiles, first))
    return are_integers and length.shape == () and groups.shape == tiles.shape and first.shape == (1,)


def megablox_flops(module: Module, instruction: Instruction) -> float:
    """FLOPs of the tiles, the last one along each axis counted whole."""
    product = _product(module, instruction)
    m, k, n = product.tile
    return 2.0 * product.visits * m * k * -(-product.depth // k) * n * -(-product.width // n)


def megablox_bytes(module: Module, instruction: Instruction) -> float:
    """Bytes from and to HBM. A block is not fetched again if the step before had the same one."""
    product = _product(module, instruction)
    m, k, n = product.tile
    k_tiles, n_tiles = -(-product.depth // k), -(-product.width // n)
    if product.is_gradient:
        times = (product.tiles * m * product.depth * n_tiles, product.tiles * m * product.width * k_tiles)
    else:
        # The innermost loop is over the depth, so blocks stay only if there is one along it.
        row_blocks = product.visits if k_tiles > 1 else product.tiles
        weight_blocks = product.visits if k_tiles > 1 else product.groups
        times = (row_blocks * m * product.depth * n_tiles, weight_blocks * product.depth * product.width)
    reads = [count * array.itemsize for count, array in zip(times, product.operands, strict=False)]
    reads += [float(array.bytes) for array in product.operands[2:]]  # what the result is added to
    moved = sum(size for size, array in zip(reads, product.operands, strict=True) if array.in_hbm)
    return moved + (product.result.bytes if product.result.in_hbm else 0)


def _product(module: Module, instruction: Instruction) -> _Product:
    arrays = [module.operand(instruction, i).arrays[0] for i in range(len(instruction.operands))]
    (left, right, *_), result = arrays[_METADATA:], instruction.arrays[0]
    is_gradient = len(result.shape) == 3
    groups = arrays[1].shape[0] - 1
    m, k, n = _tile(instruction, is_gradient)
    rows = expected_rows(instruction.op_name)
    tiles = float(-(-left.shape[0] // m))
    if rows is not None:
        tiles = min(tiles, rows / m + 0.5)  # the last row falls anywhere inside its tile
    return _Product(
        operands=tuple(arrays[_METADATA:]),
        result=result,
        is_gradient=is_gradient,
        groups=groups,
        depth=left.shape[1],
        width=right.shape[1] if is_gradient else result.shape[1],
        tiles=tiles,
        # A tile is visited once more for each group that begins inside it, and 1 of m groups begins where a tile does.
        visits=tiles + (groups - 1) * (1 - 1 / m),
        tile=(m, k, n),
    )


def _tile(instruction: Instruction, is_gradient: bool) -> tuple[int, int, int]:
    """The sizes of a tile along rows, depth and width, from the blocks that the kernel sees of its matrices."""
    blocks = block_shapes(instruction)
    left, right, out = *blocks[_METADATA - 1 : _METADATA + 1], blocks[len(instruction.operands) - 1]
    if is_gradient:  # [rows, depth], [rows, width] and [1, depth, width]
        return left[0], left[1], right[1]
    return left[0], left[1], out[1]
