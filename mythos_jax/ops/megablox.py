"""Grouped products on TPUs: the kernels of MegaBlocks (arXiv 2211.15841) that ship with JAX, and their tiles.

The kernels work on tiles of `rows` rows. A tile is multiplied once for each expert that has rows in it, so R rows of E
experts take at most R / rows + E - 1 tiles. They accumulate in float32.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Run the kernels on a CPU, slowly: for tests.
INTERPRET = False
# What a kernel may use of the chip's fast memory unless XLA is told otherwise (xla_tpu_scoped_vmem_limit_kib), less
# what the compiler needs for values that do not fit into registers.
VMEM_BYTES = 13 * 2**20
LANES = 128  # the width of a vector register; tiles are multiples of it
# A product adds to a tile of the result for each tile along its inputs; shorter ones would be limited by that.
MIN_INPUTS = 512


class Tiles(NamedTuple):
    """Rows and, of the matrices of experts, the parts along the axis summed over and along the axis of the result; for
    `outer`, the parts of a result's two axes."""

    rows: int
    inputs: int
    outputs: int


def product(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transposed: bool = False) -> jax.Array:
    """Rows times their expert's matrix [D, F], or transposed: rows [R, F] times [F, D]."""
    (R, D), E, F = x_RD.shape, w_EDF.shape[0], w_EDF.shape[1 if transposed else 2]
    tiles = product_tiles(R, E, D, F, x_RD.dtype.itemsize)
    out_RF = gmm(
        _pad(x_RD, tiles.rows), w_EDF, sizes_E, x_RD.dtype, tiles, transpose_rhs=transposed, interpret=INTERPRET
    )
    return out_RF[:R]


def outer(x_RD: jax.Array, y_RF: jax.Array, sizes_E: jax.Array, sums_EDF: jax.Array | None = None) -> jax.Array:
    """Each expert's rows of x, transposed, times those of y, in float32; added in place to `sums_EDF` if given."""
    (R, D), E, F = x_RD.shape, len(sizes_E), y_RF.shape[1]
    tiles = outer_tiles(R, E, D, F, x_RD.dtype.itemsize, jnp.dtype(jnp.float32).itemsize, sums_EDF is not None)
    x_RD, y_RF = _pad(x_RD, tiles.rows), _pad(y_RF, tiles.rows)
    return tgmm(x_RD.T, y_RF, sizes_E, jnp.float32, tiles, existing_out=sums_EDF, interpret=INTERPRET)


def sums_of_groups(x_RD: jax.Array, group_R: jax.Array, n_groups: int) -> jax.Array:
    """The sum of each group's rows, [n_groups, D], added up in float32 and returned in x's dtype.

    group_R: int32, ascending; rows of groups >= n_groups are left out. A sum over rows is a product with a matrix of
    zeros and ones: groups are taken 128 at a time, and each 128 become one expert of `outer`.
    """
    R, D = x_RD.shape
    # 0 x NaN is NaN: a row that is not finite would reach the other groups of its 128, and must reach its own.
    is_finite_R = jnp.isfinite(x_RD).all(-1)
    x_RD = jnp.where(is_finite_R[:, None], x_RD, 0)
    is_lost_N = jnp.zeros(n_groups, bool).at[group_R].max(~is_finite_R, mode="drop")
    n_blocks = -(-n_groups // LANES)
    starts = jnp.minimum(LANES * jnp.arange(n_blocks + 1), n_groups)
    bounds = jnp.sum(group_R < starts[:, None], axis=1, dtype=jnp.int32)
    one_hot_RG = (group_R[:, None] % LANES == jnp.arange(LANES)).astype(x_RD.dtype)
    tiles = outer_tiles(R, n_blocks, LANES, D, x_RD.dtype.itemsize, x_RD.dtype.itemsize, adds=False)
    one_hot_RG, x_RD = _pad(one_hot_RG, tiles.rows), _pad(x_RD, tiles.rows)
    # By default the chip would round float32 to bfloat16.
    with jax.default_matmul_precision("highest" if x_RD.dtype == jnp.float32 else "default"):
        sums = tgmm(one_hot_RG.T, x_RD, jnp.diff(bounds), x_RD.dtype, tiles, interpret=INTERPRET)
    return jnp.where(is_lost_N[:, None], jnp.nan, sums.reshape(-1, D)[:n_groups])


def tile_rows(R: int, E: int) -> int:
    """Rows of a tile: 256 where experts have that many on average, else 128, the width of the systolic array.

    Larger tiles are multiplied no faster, and more of their rows belong to another expert."""
    return 2 * LANES if R >= 2 * LANES * E else LANES


def product_tiles(R: int, E: int, D: int, F: int, itemsize: int) -> Tiles:
    """The tiles of a product of [R, D] rows with matrices [D, F] that move the fewest bytes."""
    m = tile_rows(R, E)

    def vmem(tiles: Tiles) -> int:  # operands and result are held twice, to move one while the other is used
        m, k, n = tiles
        return 2 * itemsize * (m * k + k * n + m * n) + 4 * m * n

    fitting = _fitting(m, [k for k in _sizes(D) if k >= min(D, MIN_INPUTS)], _sizes(F), vmem)
    return min(fitting, key=lambda tiles: product_bytes(R, E, D, F, itemsize, tiles))


def product_bytes(R: int, E: int, D: int, F: int, itemsize: int, tiles: Tiles) -> float:
    """Bytes that a product moves between HBM and the core. With the whole of D in one tile an expert's matrix is read
    once, and else once for each tile of rows."""
    visits = R / tiles.rows + E - 1
    rows = visits * tiles.rows * D * _parts(F, tiles.outputs)
    matrices = (E if tiles.inputs >= D else visits) * D * F
    return itemsize * (rows + matrices + R * F)


def outer_tiles(R: int, E: int, D: int, F: int, itemsize: int, out_itemsize: int, adds: bool) -> Tiles:
    """The tiles of `outer` that move the fewest bytes. adds: the result is added to existing sums."""
    m = tile_rows(R, E)

    def vmem(tiles: Tiles) -> int:  # the kernel masks rows in float32
        m, k, n = tiles
        return (2 * itemsize + 4) * m * (k + n) + (2 * out_itemsize * (1 + adds) + 4) * k * n

    return min(
        _fitting(m, _sizes(D), _sizes(F), vmem),
        key=lambda tiles: outer_bytes(R, E, D, F, itemsize, out_itemsize, adds, tiles),
    )


def outer_bytes(R: int, E: int, D: int, F: int, itemsize: int, out_itemsize: int, adds: bool, tiles: Tiles) -> float:
    """Bytes that `outer` moves between HBM and the core."""
    rows = (R + (E - 1) * tiles.rows) * (D * _parts(F, tiles.outputs) + F * _parts(D, tiles.inputs))
    return itemsize * rows + out_itemsize * (1 + adds) * E * D * F


def _fitting(rows: int, inputs: list[int], outputs: list[int], vmem: Callable[[Tiles], int]) -> Iterator[Tiles]:
    """All tiles that fit into the fast memory, largest first."""
    for k in inputs:
        for n in outputs:
            tiles = Tiles(rows, k, n)
            if vmem(tiles) <= VMEM_BYTES:
                yield tiles


def _sizes(width: int) -> list[int]:
    """The whole width, and parts of it in whole registers which together are at most a sixteenth longer."""
    lanes = -(-width // LANES)
    parts = [LANES * n for n in range(lanes - 1, 0, -1) if 16 * _parts(lanes, n) * n <= 17 * lanes]
    return [width, *parts]


def _parts(width: int, size: int) -> int:
    return math.ceil(width / size)


def _pad(x_RD: jax.Array, rows: int) -> jax.Array:
    """With more rows, to fill the last tile."""
    return jnp.pad(x_RD, ((0, -len(x_RD) % rows), (0, 0)))
