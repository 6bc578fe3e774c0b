"""The product of activations and weights against `tensordot`, with one and with two contracted axes; gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.ops.matmul import matmul


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "axes"),
    [((2, 3, 4), (4, 5), 1), ((2, 3, 4), (4, 5, 6), 1), ((2, 3, 4, 5), (4, 5, 6), 2), ((4,), (4, 5), 1)],
)
def test_equals_tensordot(x_shape, w_shape, axes):
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape).astype(np.float32) for shape in (x_shape, w_shape))
    expected, expected_vjp = jax.vjp(lambda x, w: jnp.tensordot(x, w, axes), x, w)
    actual, actual_vjp = jax.vjp(lambda x, w: matmul(x, w, axes), x, w)
    ct = random.standard_normal(expected.shape).astype(np.float32)
    for a, b in zip((actual, *actual_vjp(ct)), (expected, *expected_vjp(ct)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
