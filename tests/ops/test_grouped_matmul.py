"""The TPU's grouped product, interpreted, against one dense product per expert: values and gradients."""

import jax
import numpy as np

from mythos_jax.ops.grouped_matmul import megablox

N, D, F = 200, 6, 7


def test_megablox_equals_dense():
    """Groups that fill no tile, are empty or hold everything, and rows behind the last group, which are nobody's."""

    @jax.jit
    def value_and_gradients(x_ND, w_EDF, sizes_E, cotangent_NF):
        out, backward = jax.vjp(lambda x, w: megablox(x, w, sizes_E, interpret=True), x_ND, w_EDF)
        return out, *backward(cotangent_NF)

    random = np.random.default_rng(0)
    x, w, cotangent = (random.standard_normal(shape).astype(np.float32) for shape in [(N, D), (3, D, F), (N, F)])
    for sizes in [[64, 100, 36], [0, 200, 0], [0, 0, 150], [1, 128, 2]]:
        expected, by_x, by_w = np.zeros((N, F)), np.zeros((N, D)), np.zeros((3, D, F))
        for n, e in enumerate(np.repeat(np.arange(3), sizes)):
            expected[n] = x[n].astype(np.float64) @ w[e]
            by_x[n] = w[e] @ cotangent[n].astype(np.float64)
            by_w[e] += np.outer(x[n], cotangent[n])
        found = value_and_gradients(x, w, np.array(sizes, np.int32), cotangent)
        for a, b in zip(found, [expected, by_x, by_w], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
