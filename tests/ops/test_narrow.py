"""Products with weights that are stored as int8 or in 16 bits, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mythos_jax.model.storage import quantize
from mythos_jax.ops import narrow
from mythos_jax.ops.narrow import MAX_SPLIT_ROWS, Narrow
from mythos_jax.ops.products import linear, linear_per_head, logits

RANDOM = np.random.default_rng(0)


def stored(shape, dtype, inputs):
    """A weight and its exact values, float64. Its output channels differ in size."""
    weight = RANDOM.standard_normal(shape) * np.exp(RANDOM.standard_normal(shape[-1]))
    if dtype == "int8":
        values, scale = quantize(weight.astype(np.float32), inputs)
        return Narrow(jnp.asarray(values), jnp.asarray(scale)), values.astype(np.float64) * scale
    values = weight.astype(ml_dtypes.bfloat16)
    return Narrow(jnp.asarray(values)), values.astype(np.float64)


def check(got, x, exact, spec):
    """As close as 15 bits of x let a product be. `exact` was made from the weight as it is stored."""
    expected = np.einsum(spec, x.astype(np.float64), exact)
    bound = np.abs(x).max(-1, keepdims=True) * 2.0**-15  # of what is lost of each element of a row
    worst = np.einsum(spec, np.broadcast_to(bound, x.shape), np.abs(exact))
    assert got.dtype == jnp.float32
    assert (np.abs(np.asarray(got) - expected) <= worst + 1e-5).all()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, MAX_SPLIT_ROWS + 1])
def test_a_row_keeps_15_bits(rows, dtype):
    w, exact = stored((24, 4, 6), dtype, (0,))
    x = RANDOM.standard_normal((rows, 24)).astype(np.float32)
    x[0, 0] = 300  # a large channel, as language models have
    check(jax.jit(linear)(x, w), x, exact, "ni,ihk->nhk")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_axes_of_heads_of_experts_and_of_the_vocabulary(dtype):
    w, exact = stored((4, 6, 24), dtype, (0, 1))  # from heads back to the width
    x = RANDOM.standard_normal((2, 1, 4, 6)).astype(np.float32)
    flat = x.reshape(2, 1, 24)
    check(jax.jit(partial(linear, axes=2))(x, w), flat, exact.reshape(24, 24), "bti,io->bto")
    w, exact = stored((12, 4, 6), dtype, (0,))
    x_BTHR = RANDOM.standard_normal((2, 1, 4, 12)).astype(np.float32)
    check(jax.jit(partial(linear_per_head, axes="IHO"))(x_BTHR, w), x_BTHR, exact, "bthr,rhk->bthk")
    x_BTHK = RANDOM.standard_normal((2, 1, 4, 6)).astype(np.float32)
    got = jax.jit(partial(linear_per_head, axes="OHI"))(x_BTHK, w)
    expected = np.einsum("bthk,rhk->bthr", x_BTHK, exact)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    w, exact = stored((40, 24), dtype, (1,))
    x = RANDOM.standard_normal((2, 1, 24)).astype(np.float32)
    check(jax.jit(logits)(x, w), x, exact, "btd,vd->btv")


def test_rows_of_int8_products_do_not_depend_on_the_others():
    w, _ = stored((24, 16), "int8", (0,))
    x = RANDOM.standard_normal((5, 24)).astype(np.float32)
    together, alone = jax.jit(linear)(x, w), [jax.jit(linear)(row[None], w)[0] for row in x]
    np.testing.assert_array_equal(together, alone)


def test_decoding_widens_no_weight_on_a_cpu(monkeypatch):
    w, _ = stored((64, 128), "int8", (0,))
    text = jax.jit(linear).lower(np.ones((1, 64), np.float32), w).as_text()
    assert "64x128xf32" not in text
    monkeypatch.setattr(narrow, "platform", lambda: "tpu")  # where the conversion is part of the product
    text = jax.jit(lambda x, w: linear(x, w)).lower(np.ones((1, 64), np.float32), w).as_text()
    assert "64x128xf32" in text


def test_zero_rows_and_channels_stay_zero_and_nan_stays_visible():
    weight = np.zeros((8, 3), np.float32)
    weight[:, 1] = 2
    w = Narrow(*map(jnp.asarray, quantize(weight, (0,))))
    x = np.zeros((3, 8), np.float32)
    x[1], x[2, 0] = 1, np.nan
    y = np.asarray(jax.jit(linear)(x, w))
    np.testing.assert_allclose(y[:2], x[:2] @ np.asarray(w.widened(jnp.float32)), rtol=1e-6)
    assert np.isnan(y[2]).all()


def test_weights_of_many_layers_are_not_widened_together():
    layers = [stored((256, 256), "int8", (0,))[0] for _ in range(8)]

    def run(x, layers):
        for w in layers:
            x = linear(x, w)
        return x

    program = jax.jit(run).lower(np.ones((MAX_SPLIT_ROWS + 1, 256), np.float32), layers).compile()
    assert program.memory_analysis().temp_size_in_bytes < 3 * 4 * 256 * 256
