"""The GPU's grouped products, interpreted, against one dense product per expert."""

import itertools
import re

import jax
import numpy as np
import pytest

from mythos_jax.ops import grouped_triton

E = 3


@pytest.mark.parametrize(
    ("R", "D", "F", "all_sizes"),
    [
        # Groups smaller than a tile, empty groups, one group with all rows, and rows that belong to no group.
        (200, 6, 70, [[64, 100, 36], [0, 200, 0], [0, 0, 150], [1, 128, 2], [0, 0, 0]]),
        (9, 96, 16, [[4, 0, 5], [0, 0, 2]]),  # fewer rows than a tile has
    ],
)
def test_equal_to_dense_products(R, D, F, all_sizes):
    @jax.jit
    def products(x_RD, y_RF, w_EDF, sizes_E, sums_EDF):
        return (
            grouped_triton.product(x_RD, w_EDF, sizes_E, interpret=True),
            grouped_triton.product(y_RF, w_EDF, sizes_E, transposed=True, interpret=True),
            grouped_triton.outer(x_RD, y_RF, sizes_E, interpret=True),
            grouped_triton.outer(x_RD, y_RF, sizes_E, sums_EDF, interpret=True),
        )

    random = np.random.default_rng(0)
    shapes = [(R, D), (R, F), (E, D, F), (E, D, F)]
    x, y, w, sums = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    for sizes in all_sizes:
        n = sum(sizes)
        expert = np.repeat(np.arange(E), sizes)
        rows = [np.flatnonzero(expert == e) for e in range(E)]
        xw, yw = np.zeros((n, F)), np.zeros((n, D))
        for e in range(E):
            xw[rows[e]], yw[rows[e]] = x[rows[e]] @ w[e], y[rows[e]] @ w[e].T
        xy = np.stack([x[rows[e]].T @ y[rows[e]] for e in range(E)])
        # Rows of no expert may hold anything, and nothing may depend on them.
        dirty_x, dirty_y = x.copy(), y.copy()
        dirty_x[n:] = dirty_y[n:] = np.nan
        actual = products(dirty_x, dirty_y, w, np.array(sizes, np.int32), sums)
        for a, b in zip(actual, [xw, yw, xy, sums + xy], strict=True):
            np.testing.assert_allclose(a[: len(b)], b, rtol=0, atol=1e-5 * max(1, np.abs(b).max(initial=0)))


def test_tiles_are_few_and_blocks_fit():
    """At 2,048 rows an expert at most 1.04 times the rows are multiplied, and blocks suit the GPU's matrix units."""
    R, E = 16 * 2048, 16
    blocks = grouped_triton.product_blocks(R, (E, 2048, 5632), False, 2)
    assert blocks == (128, 256, 64)
    sizes = np.random.default_rng(0).multinomial(R, np.full(E, 1 / E)).astype(np.int32)
    expert, start, end = np.asarray(grouped_triton._tiles(sizes, R, blocks.rows))
    visited = start < end
    assert visited.sum() * blocks.rows < 1.04 * R
    assert (expert[visited] == np.searchsorted(np.cumsum(sizes), start[visited], side="right")).all()
    starts = np.append(0, np.cumsum(sizes))
    expected = [row for a, b in itertools.pairwise(starts) for row in range(a, b, blocks.rows)]
    assert start[visited].tolist() == expected
    assert (end[visited] == starts[1:][expert[visited]]).all()


def test_they_are_lowered_for_cuda_to_triton_without_a_gpu():
    """One program for each tile of 128 x 256, and no product outside the kernels."""
    R, E, D, F = 8192, 4, 512, 1024

    def products(x_RD, y_RF, w_EDF, sizes_E, sums_EDF):
        return (
            grouped_triton.product(x_RD, w_EDF, sizes_E),
            grouped_triton.product(y_RF, w_EDF, sizes_E, transposed=True),
            grouped_triton.outer(x_RD, y_RF, sizes_E, sums_EDF),
        )

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    arrays = array(R, D), array(R, F), array(E, D, F), array(E, dtype="int32"), array(E, D, F, dtype="float32")
    text = jax.jit(products).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    grid = r"grid_x = (\d+) : i32, grid_y = (\d+) : i32, grid_z = (\d+)"
    tiles = (R + E * 127) // 128
    assert sorted(re.findall(grid, text)) == sorted(
        tuple(map(str, n)) for n in [(F // 256, tiles, 1), (D // 256, tiles, 1), (F // 256, D // 128, E)]
    )
    assert "stablehlo.dot" not in text
