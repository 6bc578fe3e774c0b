"""Products in 8 bits, against the same arithmetic in NumPy."""

from dataclasses import replace
from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mythos_jax.config import MeshConfig
from mythos_jax.model.mythos import Mythos
from mythos_jax.ops.products import LowRank, linear, linear_to_heads
from mythos_jax.ops.quantized import quantized_matmul
from mythos_jax.sharding import make_mesh, use_mesh
from tests import tiny

RANDOM = np.random.default_rng(0)
LARGEST = {"int8": 127, "e4m3": 448, "e5m2": 57344}


def rounded(a, axis, kind):
    """8-bit values of a matrix, with a scale for each row or column, in float32."""
    scale = np.maximum(np.abs(a).max(axis, keepdims=True), np.float32(1e-30)) * np.float32(1 / LARGEST[kind])
    if kind == "int8":
        return np.rint(a / scale).astype(np.int64), scale
    return (a / scale).astype(ml_dtypes.float8_e4m3fn if kind == "e4m3" else ml_dtypes.float8_e5m2), scale


def emulated(a, b, kinds):
    """The product of two matrices [N, I] and [I, O]; sums exact, or float64."""
    (a, a_scale), (b, b_scale) = rounded(a, 1, kinds[0]), rounded(b, 0, kinds[1])
    sums = a @ b if a.dtype == np.int64 else a.astype(np.float64) @ b.astype(np.float64)
    return sums.astype(np.float32) * a_scale * b_scale


def matrices():
    """Rows and channels of different sizes, one row of zeros, one large channel as language models have."""
    x = RANDOM.standard_normal((24, 40)) * np.exp(3 * RANDOM.standard_normal((24, 1)))
    w = RANDOM.standard_normal((40, 32)) * np.exp(RANDOM.standard_normal(32))
    ct = RANDOM.standard_normal((24, 32)) * np.exp(3 * RANDOM.standard_normal((24, 1)))
    x[5], ct[7], x[:, 3] = 0, 0, 50 * x[:, 3]
    return tuple(a.astype(np.float32) for a in (x, w, ct))


def value_and_gradients(x, w, ct, axes, kind):
    y, pull = jax.vjp(partial(quantized_matmul, axes=axes, kind=kind), x, w)
    return y, *pull(ct)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, tensor=2, data=2)])
def test_int8_is_exact_and_its_gradient_is_straight_through(axes, mesh):
    x, w, ct = matrices()
    shape = (4, 10) if axes == 2 else (40,)
    given = x.reshape(4, 6, *shape), w.reshape(*shape, 8, 4), ct.reshape(4, 6, 8, 4)
    run = jax.jit(partial(value_and_gradients, axes=axes, kind="int8"))
    if mesh is None:
        y, dx, dw = run(*given)
    else:
        with use_mesh(make_mesh(mesh)):
            y, dx, dw = run(*given)
    np.testing.assert_array_equal(np.reshape(y, (24, 32)), emulated(x, w, ("int8", "int8")))
    np.testing.assert_array_equal(np.reshape(dx, x.shape), emulated(ct, w.T, ("int8", "int8")))
    np.testing.assert_allclose(np.reshape(dw, w.shape), x.T.astype(np.float64) @ ct, rtol=1e-5, atol=1e-3)


def test_float8_has_a_larger_range_for_gradients():
    x, w, ct = matrices()
    y, dx, dw = jax.jit(partial(value_and_gradients, axes=1, kind="fp8"))(x, w, ct)
    for got, expected in ((y, emulated(x, w, ("e4m3", "e4m3"))), (dx, emulated(ct, w.T, ("e5m2", "e4m3")))):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(dw, x.T.astype(np.float64) @ ct, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_error_is_that_of_8_bits(kind, dtype):
    """Not a comparison with the same formulas: the product itself, to the precision of the type."""
    x, w = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((64, 256), (256, 64)))
    x, w = (a.astype(dtype).astype(np.float32) for a in (x, w))
    y = quantized_matmul(jnp.asarray(x, dtype), jnp.asarray(w, dtype), 1, kind)
    assert y.dtype == dtype
    error = np.asarray(y, np.float32) - x @ w
    # int8: an error that is uniform within a step, in both operands. fp8: 3 bits after the first, relative.
    steps = [np.abs(a).max(axis) / 127 for a, axis in ((x, 1), (w, 0))]
    expected = {"int8": np.sqrt(np.mean(np.square(steps)) * 2 / 12), "fp8": 0.037}[kind]
    assert np.std(error) / np.std(x @ w) == pytest.approx(expected, rel=0.15)


def test_matrices_that_stay_are_rounded_too_and_low_rank_weights_are_not():
    x, w, _ = matrices()
    a, b = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((40, 2), (2, 32)))
    got, pull = jax.vjp(
        lambda w: linear(x, w, products="int8"), LowRank(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b))
    )
    expected = emulated(x, w, ("int8", "int8")) + x.astype(np.float64) @ a @ b
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    gradients = pull(jnp.ones_like(got))[0]
    assert not np.asarray(gradients.base).any()
    np.testing.assert_allclose(gradients.b, (x @ a).T @ np.ones((24, 32)), rtol=1e-4, atol=1e-3)


def test_products_to_heads_are_rounded():
    x, w, _ = matrices()
    got = linear_to_heads(x.reshape(4, 6, 40), w.reshape(40, 8, 4), "int8")
    np.testing.assert_array_equal(np.reshape(got, (24, 32)), emulated(x, w, ("int8", "int8")))


def loss(params, config, products):
    variables = {**tiny.variables(config), "params": params}
    out = Mythos(replace(config, products=products)).apply(variables, tiny.some_tokens())
    return (out.logits**2).mean()


@pytest.mark.parametrize(("config", "per_layer"), [(tiny.GQA_LAST, 7), (tiny.MLA, 9)])
def test_every_matrix_of_the_layers_is_multiplied_in_8_bits(config, per_layer):
    """q, k, v, out (GQA), or q_down, q_up, kv_down, k_up, v_up, out (MLA), and gate, up, down: with the gradient, two
    products each. Prelude, loop and coda have one layer each."""

    def products_of_int8(products):
        gradient = jax.jit(jax.grad(partial(loss, config=config, products=products)))
        lines = gradient.lower(tiny.variables(config)["params"]).as_text().splitlines()
        return sum("dot_general" in line and "xi8>" in line for line in lines)

    assert products_of_int8("int8") == 2 * 3 * per_layer
    assert products_of_int8("dtype") == 0


def test_the_gradient_of_a_model_points_the_same_way():
    config = replace(tiny.GQA_LAST, loops=2)
    exact, rounded = (
        jax.flatten_util.ravel_pytree(
            jax.jit(jax.grad(partial(loss, config=config, products=products)))(tiny.variables(config)["params"])
        )[0]
        for products in ("dtype", "int8")
    )
    assert 0.99 < np.vdot(exact, rounded) / np.linalg.norm(exact) / np.linalg.norm(rounded) < 0.99999
