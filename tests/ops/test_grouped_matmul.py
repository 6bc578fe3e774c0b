"""The TPU's grouped matrix product, in interpreted mode, against one dense product per expert; gradients too."""

import jax
import numpy as np

from mythos_jax.ops.grouped_matmul import megablox

N, D, F = 200, 6, 7


def test_megablox_equals_dense():
    """Groups smaller than a tile, empty groups, one group with all rows, and rows that belong to no group."""

    @jax.jit
    def value_and_gradients(x_ND, w_EDF, sizes_E, cotangent_NF):
        out, vjp = jax.vjp(lambda x, w: megablox(x, w, sizes_E, interpret=True), x_ND, w_EDF)
        return out, *vjp(cotangent_NF)

    random = np.random.default_rng(0)
    x, w, cotangent = (random.standard_normal(shape).astype(np.float32) for shape in [(N, D), (3, D, F), (N, F)])
    for sizes in [[64, 100, 36], [0, 200, 0], [0, 0, 150], [1, 128, 2]]:
        expected, expected_dx, expected_dw = np.zeros((N, F)), np.zeros((N, D)), np.zeros((3, D, F))
        for n, e in enumerate(np.repeat(np.arange(3), sizes)):
            expected[n] = x[n].astype(np.float64) @ w[e]
            expected_dx[n] = w[e] @ cotangent[n].astype(np.float64)
            expected_dw[e] += np.outer(x[n], cotangent[n])
        actual = value_and_gradients(x, w, np.array(sizes, np.int32), cotangent)
        for a, b in zip(actual, [expected, expected_dx, expected_dw], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
