"""Chunked cross-entropy against a softmax over all logits at once, values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.ops.chunked import MAX_UNCHUNKED_VOCAB, count_chunks, map_counted_chunks
from mythos_jax.ops.cross_entropy import cross_entropy
from mythos_jax.preflight.hlo import parse


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


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1], ids="{:.0%}".format)
def test_positions_that_do_not_count_change_nothing(share, chunk):
    """Losses, and gradients under weights, are those of all positions times the mask, for a bool and for weights; what
    is at the other positions reaches nothing."""
    random = np.random.default_rng(0)
    features, table = np.float32(random.standard_normal((3, 13, 8))), np.float32(random.standard_normal((40, 8)))
    targets, mask = random.integers(0, 40, (3, 13)), (random.random((3, 13)) < share) * random.random((3, 13))
    lost = np.where(mask[..., None] == 0, 100, features).astype(np.float32)

    def total(features, table, mask):
        loss = cross_entropy(features, table, targets, chunk, mask_BT=mask)
        return (loss * mask).sum(), loss

    found, ours = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(lost, table, jnp.float32(mask))
    every, theirs = jax.value_and_grad(lambda *x: (cross_entropy(*x, targets, 13) * mask).sum(), (0, 1))(
        features, table
    )
    np.testing.assert_allclose(found[0], every, rtol=1e-6)
    np.testing.assert_array_equal(found[1], np.where(mask != 0, cross_entropy(features, table, targets, 13), 0))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    same = cross_entropy(lost, table, targets, chunk, mask_BT=mask != 0)
    np.testing.assert_array_equal(same, found[1])


def test_only_chunks_with_positions_that_count_are_computed():
    """One program for any mask; each position's own chunk is counted as it runs."""
    counts = np.zeros((4, 8), bool)
    counts[1, 3] = counts[3, 2:7] = True
    ran = []

    def double(x_BC):
        jax.debug.callback(lambda x: ran.append(x.shape), x_BC)
        return 2 * x_BC, -x_BC

    program = jax.jit(lambda x, counts: map_counted_chunks(double, (x,), counts, 40, chunk_length=1))
    x = np.arange(1.0, 33).reshape(4, 8)
    for mask, chunks in [(counts, 2), (counts | True, 8), (counts & False, 0)]:
        ran.clear()
        twice, minus = program(x, mask)
        jax.effects_barrier()
        np.testing.assert_array_equal(twice, np.where(mask, 2 * x, 0))
        np.testing.assert_array_equal(minus, np.where(mask, -x, 0))
        assert len(ran) == chunks
    assert program._cache_size() == 1


def test_the_chunks_of_a_compiled_loss_are_found():
    """`mythos compile` tells by their names the loops whose length depends on the mask."""
    arrays = (
        jnp.zeros((2, 512, 4)),
        jnp.zeros((MAX_UNCHUNKED_VOCAB + 1, 4)),
        jnp.zeros((2, 512), int),
        jnp.ones((2, 512)),
    )
    total = lambda features, table, targets, mask: cross_entropy(features, table, targets, mask_BT=mask).sum()  # noqa: E731
    text = jax.jit(jax.grad(total, (0, 1))).lower(*arrays).compile().as_text()
    runs = parse(text, traced_chunks=5).runs
    assert {runs[name] for name in set(re.findall(r"body=%?([\w.-]+)", text))} == {5}
    assert count_chunks(512, MAX_UNCHUNKED_VOCAB + 1) == 2
