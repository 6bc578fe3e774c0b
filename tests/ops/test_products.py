"""Products with low-rank weights beside a matrix, against those with the sum, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model.storage import quantize
from mythos_jax.ops.narrow import Narrow
from mythos_jax.ops.products import LowRank, linear, linear_per_head, linear_to_heads, some_outputs

RANDOM = np.random.default_rng(0)
R = 3


def low_rank(shape, inputs, narrow=False):
    """Low-rank weights beside a matrix, and the exact sum. They are as large as the matrix."""
    base, a, b = (
        RANDOM.standard_normal(size).astype(np.float32) for size in (shape, (*shape[:inputs], R), (R, *shape[inputs:]))
    )
    stored, exact = base, base.astype(np.float64)
    if narrow:
        values, scale = quantize(base, tuple(range(inputs)))
        stored, exact = Narrow(jnp.asarray(values), jnp.asarray(scale)), values.astype(np.float64) * scale
    return LowRank(stored, a, b), exact + np.tensordot(a.astype(np.float64), b, 1)


def check(got, spec, x, exact):
    expected = np.einsum(spec, x.astype(np.float64), exact)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("narrow", [False, True])
def test_one_and_two_axes_of_inputs(narrow):
    x = RANDOM.standard_normal((2, 5, 4, 6)).astype(np.float32)
    w, exact = low_rank((6, 8), 1, narrow)
    check(linear(x, w), "bthi,io->btho", x, exact)
    w, exact = low_rank((4, 6, 8), 2, narrow)
    check(linear(x, w, 2), "bthi,hio->bto", x, exact)


@pytest.mark.parametrize("narrow", [False, True])
def test_heads(narrow):
    w, exact = low_rank((6, 4, 8), 1, narrow)
    x = RANDOM.standard_normal((2, 5, 6)).astype(np.float32)
    check(linear_to_heads(x, w), "bti,iho->btho", x, exact)
    x = RANDOM.standard_normal((2, 5, 4, 6)).astype(np.float32)
    check(linear_per_head(x, w, "IHO"), "bthi,iho->btho", x, exact)
    y = RANDOM.standard_normal((2, 5, 4, 8)).astype(np.float32)
    check(linear_per_head(y, w, "OHI"), "bthi,ohi->btho", y, exact)
    last = some_outputs(w, slice(5, None))
    check(linear_to_heads(x[:, :, 0], last), "bti,iho->btho", x[:, :, 0], exact[..., 5:])
