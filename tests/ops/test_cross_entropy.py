"""Chunked cross-entropy against a softmax over all logits at once, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.ops.cross_entropy import cross_entropy


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 16])
def test_chunked_cross_entropy_equals_the_unchunked(chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    features, table = jax.random.normal(keys[0], (3, 13, 8)), jax.random.normal(keys[1], (40, 8))
    targets = jax.random.randint(keys[2], (3, 13), 0, 40)

    def unchunked(features, table):
        p = jax.nn.softmax(features @ table.T)
        return -jnp.log(jnp.take_along_axis(p, targets[..., None], -1))[..., 0]

    np.testing.assert_allclose(cross_entropy(features, table, targets, chunk), unchunked(features, table), atol=1e-5)
    ours = jax.grad(lambda *x: cross_entropy(*x, targets, chunk).sum(), (0, 1))(features, table)
    theirs = jax.grad(lambda *x: unchunked(*x).sum(), (0, 1))(features, table)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
