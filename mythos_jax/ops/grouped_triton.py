"""The grouped products of ops/grouped_matmul.py on NVIDIA GPUs, A100 and newer: Pallas kernels that Triton compiles.

XLA compiles `lax.ragged_dot` for these GPUs to dense products over all experts. Here an expert's rows are cut into
tiles of their own, counted from its first row, so that rows are multiplied only by their own expert's matrix, and at
most a part of each expert's last tile is wasted. Why they are not a library's: docs/pods.md.

Shape suffixes: R rows, sorted by expert, E experts, D and F the widths of their matrices. sizes_E: int32, rows of each
expert, together at most R. Sums are float32. interpret: run on a CPU, slowly, for tests.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The names of the kernels in compiled programs, by which preflight/ knows them.
PRODUCT, OUTER = "grouped_product", "grouped_outer"
# The least size that the matrix units of a GPU multiply.
_MIN_BLOCK = 16


class Blocks(NamedTuple):
    """What one program of a kernel's grid computes: rows and columns of a result, and how much it sums at a time."""

    rows: int
    columns: int
    summed: int


def product(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transposed: bool = False, interpret: bool = False
) -> jax.Array:
    """Multiplies rows by their expert's matrix: [R, F]. transposed: by its transpose, from [R, F] to [R, D].

    Rows that belong to no expert are not written: they hold arbitrary values.
    """
    from jax.experimental import pallas as pl  # importing it takes half a second, so only when needed
    from jax.experimental.pallas import triton

    R, n_columns = x_RD.shape[0], w_EDF.shape[1 if transposed else 2]
    x_RD, w_EDF = _padded(x_RD, 1), _padded(_padded(w_EDF, 1), 2)
    blocks = product_blocks(R, w_EDF.shape, transposed, x_RD.dtype.itemsize)
    x_RD = jnp.pad(x_RD, ((0, max(0, blocks.rows - R)), (0, 0)))
    n_rows, depth = x_RD.shape
    columns = w_EDF.shape[1 if transposed else 2]
    tiles = _tiles(sizes_E, n_rows, blocks.rows)

    def kernel(x_ref: Any, w_ref: Any, tiles_ref: Any, out_ref: Any) -> None:
        expert, start, end = (tiles_ref[i, pl.program_id(1)] for i in range(3))
        # A tile that would reach beyond the array is moved back.
        first = jnp.minimum(start, n_rows - blocks.rows)
        tile_rows, tile_columns = pl.ds(first, blocks.rows), pl.ds(pl.program_id(0) * blocks.columns, blocks.columns)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            part = pl.ds(i * blocks.summed, blocks.summed)
            w = w_ref[expert, tile_columns, part].T if transposed else w_ref[expert, part, tile_columns]
            return total + _dot(x_ref[tile_rows, part], w)

        @pl.when(start < end)
        def _() -> None:
            zeros = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
            total = jax.lax.fori_loop(0, depth // blocks.summed, add, zeros)
            row = first + jnp.arange(blocks.rows)
            is_own = ((row >= start) & (row < end))[:, None]
            triton.store(out_ref.at[tile_rows, tile_columns], total.astype(out_ref.dtype), mask=is_own)

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((n_rows, columns), x_RD.dtype),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        # A tile's columns come one after the other, so that an expert's matrix is in the cache for its next tile.
        grid=(columns // blocks.columns, tiles.shape[1]),
        compiler_params=triton.CompilerParams(num_warps=_warps(blocks), num_stages=3),
        interpret=interpret,
        name=PRODUCT,
    )(x_RD, w_EDF, tiles)
    return out[:R, :n_columns]


def outer(
    x_RD: jax.Array, y_RF: jax.Array, sizes_E: jax.Array, sums_EDF: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
    """For each expert, the product of its rows of x, transposed, with those of y: float32 [E, D, F]; added to
    `sums_EDF`, where it is given, in place."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    D, F, E = x_RD.shape[1], y_RF.shape[1], len(sizes_E)
    x_RD, y_RF = _padded(x_RD, 1), _padded(y_RF, 1)
    blocks = outer_blocks(x_RD.shape[1], y_RF.shape[1], x_RD.dtype.itemsize)
    x_RD, y_RF = (jnp.pad(a, ((0, max(0, blocks.summed - len(a))), (0, 0))) for a in (x_RD, y_RF))
    n_rows, ends_E = len(x_RD), jnp.cumsum(sizes_E)
    bounds = jnp.stack([ends_E - sizes_E, ends_E]).astype(jnp.int32)
    sums = [] if sums_EDF is None else [_padded(_padded(sums_EDF, 1), 2)]

    def kernel(x_ref: Any, y_ref: Any, bounds_ref: Any, *sums_and_out: Any) -> None:
        expert = pl.program_id(2)
        start, end = bounds_ref[0, expert], bounds_ref[1, expert]
        rows = pl.ds(pl.program_id(1) * blocks.rows, blocks.rows)
        columns = pl.ds(pl.program_id(0) * blocks.columns, blocks.columns)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            here = start + i * blocks.summed
            first = jnp.minimum(here, n_rows - blocks.summed)
            row = first + jnp.arange(blocks.summed)
            # Both are masked, since rows of no expert may hold NaN.
            is_own, part = ((row >= here) & (row < end))[:, None], pl.ds(first, blocks.summed)
            x = triton.load(x_ref.at[part, rows], mask=is_own, other=0.0)
            return total + _dot(x.T, triton.load(y_ref.at[part, columns], mask=is_own, other=0.0))

        *sums_ref, out_ref = sums_and_out
        total = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
        for ref in sums_ref:
            total = ref[expert, rows, columns]
        out_ref[expert, rows, columns] = jax.lax.fori_loop(0, pl.cdiv(end - start, blocks.summed), add, total)

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((E, x_RD.shape[1], y_RF.shape[1]), jnp.float32),
        in_specs=[pl.no_block_spec] * (3 + len(sums)),
        out_specs=pl.no_block_spec,
        grid=(y_RF.shape[1] // blocks.columns, x_RD.shape[1] // blocks.rows, E),
        input_output_aliases={3: 0} if sums else {},
        compiler_params=triton.CompilerParams(num_warps=_warps(blocks), num_stages=3),
        interpret=interpret,
        name=OUTER,
    )(x_RD, y_RF, bounds, *sums)
    return out[:, :D, :F]


def product_blocks(R: int, shape_EDF: tuple[int, ...], transposed: bool, itemsize: float) -> Blocks:
    """Rows of a tile: about as many as an expert has on average, up to 128. shape_EDF: of the matrices, as stored."""
    E, summed, columns = (shape_EDF[i] for i in ((0, 2, 1) if transposed else (0, 1, 2)))
    rows = min(128, max(_MIN_BLOCK, 1 << max(0, (R // E).bit_length() - 1)))
    max_columns, max_summed = _max_blocks(itemsize)
    return Blocks(rows, _block(columns, max_columns), _block(summed, max_summed))


def outer_blocks(D: int, F: int, itemsize: float) -> Blocks:
    max_columns, summed = _max_blocks(itemsize)
    return Blocks(_block(D, 128), _block(F, max_columns), summed)


def _max_blocks(itemsize: float) -> tuple[int, int]:
    """Columns, and how much is summed at a time: three stages fit into an A100's shared memory, 163 KiB."""
    return (256, 64) if itemsize == 2 else (64, 32)


def _block(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides a size."""
    return min(most, size & -size)


def _warps(blocks: Blocks) -> int:
    return 8 if blocks.rows * blocks.columns > 128 * 128 else 4


def _padded(x: jax.Array, axis: int) -> jax.Array:
    """With zeros behind an axis, so that the least block divides it. Only odd sizes change."""
    missing = -x.shape[axis] % _MIN_BLOCK
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _tiles(sizes_E: jax.Array, R: int, rows: int) -> jax.Array:
    """Int32 [3, tiles]: each tile's expert, its first row, and the end of its expert's rows. The last are empty."""
    E = len(sizes_E)
    n_tiles = min(R, (R + E * (rows - 1)) // rows)  # no more, however the rows are divided
    tiles_E = -(-sizes_E // rows)
    last_tiles_E, ends_E = jnp.cumsum(tiles_E), jnp.cumsum(sizes_E)
    tile = jnp.arange(n_tiles)
    expert = jnp.searchsorted(last_tiles_E, tile, side="right", method="compare_all")
    is_empty, expert = expert == E, jnp.minimum(expert, E - 1)
    start = (ends_E - sizes_E)[expert] + (tile - (last_tiles_E - tiles_E)[expert]) * rows
    return jnp.stack([expert, start, jnp.where(is_empty, 0, ends_E[expert])]).astype(jnp.int32)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Float32. Of float32 matrices without TF32's rounding."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
