"""Injection is contractive; the loop embedding and LoRA agree with the original beyond the trained depth."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model.injection import LoopLoRA, OpenMythosInjection, ParcaeInjection, loop_embedding
from tests.tiny import GQA, variables

EXTREMES = [-1e30, -100.0, -20.0, -18.0, -1.0, 0.0, 1.0, 20.0, 100.0, 1e30]


@pytest.mark.parametrize("other", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize(
    ("kind", "second"), [(OpenMythosInjection, "log_dt"), (ParcaeInjection, "dt_bias")], ids=["openmythos", "parcae"]
)
def test_decay_is_strictly_between_0_and_1(kind, second, other):
    config = replace(GQA, dim=len(EXTREMES), n_heads=1, n_kv_heads=1)
    params = {"log_a": jnp.array(EXTREMES), "b": jnp.zeros(len(EXTREMES)), "norm": {"scale": jnp.ones(len(EXTREMES))}}
    params[second] = jnp.full(1 if second == "log_dt" else len(EXTREMES), other)
    if kind is ParcaeInjection:
        params["b"] = jnp.eye(len(EXTREMES))

    def decay_of(params):
        return kind(config).apply({"params": params}, method="decay")

    decay, gradients = decay_of(params), jax.grad(lambda p: decay_of(p).sum())(params)
    assert decay.dtype == jnp.float32
    assert (decay < 1).all()
    assert (decay > 0).all()
    assert (np.diff(decay) <= 0).all()  # the larger log_a, the faster the decay
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("dim", [4, 8, 12, 16, 24, 32, 40, 256])
def test_loop_embedding(dim):
    """dim // 8 channels: sines then cosines; an odd number drops the last cosine; one channel is a sine."""
    width = dim // 8
    got = np.asarray(loop_embedding(jnp.array([0, 3, 1000]), dim))
    assert got.shape == (3, 1, dim)
    for row, t in zip(got[:, 0], [0, 3, 1000], strict=True):
        angles = [t * 1e4 ** (-2 * k / width) for k in range((width + 1) // 2)] if width else []
        expected = ([np.sin(a) for a in angles] + [np.cos(a) for a in angles])[:width]
        np.testing.assert_allclose(row, np.pad(expected, (0, dim - width)), rtol=0, atol=1e-4)


def test_lora_uses_its_last_row_beyond_the_trained_depth():
    params = variables(GQA)["params"]["recurrence"]["cell"]["lora"]
    y = np.random.default_rng(0).standard_normal((5, 2, GQA.dim)).astype(np.float32)
    out = jax.jit(LoopLoRA(GQA).apply)({"params": params}, y, jnp.array([0, 1, 2, 3, 99]))
    for row, t in enumerate([0, 1, 2, 2, 2]):
        expected = (y[row] @ params["down"]["kernel"] * params["scale"][t]) @ params["up"]["kernel"]
        np.testing.assert_allclose(out[row], expected, rtol=0, atol=1e-5)
