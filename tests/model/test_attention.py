"""Attention: causality, isolation of documents, and the two forms of MLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model import layers
from mythos_jax.model.attention import AttentionContext, MultiHeadLatentAttention
from mythos_jax.model.cache import LayerCache, empty_kv
from mythos_jax.model.layers import apply_rope, rope_tables
from mythos_jax.ops.attention import Mask, attend
from tests import reference
from tests.tiny import GQA, MLA, B, T, exact, run, some_tokens, variables

LOOPS = 5


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa_moe", "mla_dense"])
def test_later_tokens_do_not_change_earlier_logits(config):
    tokens = some_tokens()
    before = run(config, variables(config), tokens, loops=LOOPS, initial_state=None).logits
    for position in (T - 1, 3):
        changed = tokens.copy()
        changed[:, position] = (changed[:, position] + 1) % config.vocab_size
        after = run(config, variables(config), changed, loops=LOOPS, initial_state=None).logits
        np.testing.assert_allclose(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert (np.abs(after - before)[:, position].max(-1) > 1e-2).all()


def test_rows_of_a_batch_are_independent():
    tokens = some_tokens()
    before = run(GQA, variables(GQA), tokens, loops=LOOPS, initial_state=None).logits
    changed = np.stack([tokens[1], (tokens[0] + 1) % GQA.vocab_size])
    after = run(GQA, variables(GQA), changed, loops=LOOPS, initial_state=None).logits
    np.testing.assert_allclose(after[0], before[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa_moe", "mla_dense"])
def test_documents_in_a_row_are_isolated(config):
    """Each document gives the same logits as on its own, with positions from 0; segment 0 is padding."""
    lengths = [[3, 4], [5, 3]]
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b, row in enumerate(lengths):
        ends = np.cumsum(row)
        for i, (length, end) in enumerate(zip(row, ends, strict=True)):
            segments[b, end - length : end] = i + 1
            positions[b, end - length : end] = np.arange(length)
    tokens = some_tokens()
    out = run(config, variables(config), tokens, loops=LOOPS, segment_ids=segments, positions=positions)
    load = 0
    for b, i in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        in_document = segments[b] == i
        truth = reference.forward(config, exact(variables(config)), tokens[b, in_document], LOOPS)
        np.testing.assert_allclose(out.logits[b, in_document], truth.logits, rtol=0, atol=1e-4)
        load += truth.load
    if config.feed_forward == "moe":  # padding is not counted
        np.testing.assert_array_equal(out.aux.expert_load, load)


def test_absorbed_mla_equals_expanded():
    """With a cache that holds more tokens than there are queries, as in decoding."""
    random, queries = np.random.default_rng(0), 3
    index = jnp.broadcast_to(T - queries + jnp.arange(queries), (B, queries))
    context = AttentionContext(rope=rope_tables(index, MLA), mask=Mask(index_BT=index))
    stored = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), empty_kv(MLA, 1, B, T))
    x = random.standard_normal((B, queries, MLA.dim)).astype(np.float32)
    params = variables(MLA)["params"]["coda_0"]["attention"]

    def call(absorb):
        module = MultiHeadLatentAttention(MLA, absorb=absorb)
        return jax.jit(module.apply)({"params": params}, x, context, LayerCache(kv=stored))

    (absorbed, cache), (expanded, _) = call(True), call(False)
    assert np.abs(expanded).max() > 0.1
    np.testing.assert_allclose(absorbed, expanded, rtol=0, atol=1e-5)
    # Only the entries of the new tokens were written.
    np.testing.assert_array_equal(cache.kv.keys[:, :, : T - queries], stored.keys[:, :, : T - queries])
    assert np.abs(cache.kv.keys - stored.keys)[:, :, T - queries :].min(-1).max() > 0


def test_kv_head_serves_adjacent_query_heads():
    """Key/value head g serves query heads g H/G to (g + 1) H/G - 1: repeated, not tiled."""
    q = jnp.zeros((1, 1, 4, 2))
    k, v = jnp.zeros((1, 1, 2, 2)), jnp.arange(2.0).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(attend(q, k, v, Mask(), 1.0)[0, 0, :, 0], [0, 0, 1, 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_is_a_complex_product_on_every_platform(monkeypatch, dtype):
    """A pair of channels is a complex number; rotating it multiplies it by e^(i angle), and its gradient by the
    conjugate. The form for TPUs, a product with a constant matrix, gives the same bits."""
    keys, shape = jax.random.split(jax.random.key(0)), (2, 5, 3, MLA.rope_dim)
    x_BTHK, ct_BTHK = (jax.random.normal(key, shape).astype(dtype) for key in keys)
    cos, sin = tables = rope_tables(jnp.array([[0, 1, 2, 3, 4], [7, 300, 301, 302, 303]]), MLA)
    turn_BTHC = np.exp(1j * np.arctan2(sin, cos).astype(np.float64))[:, :, None, ::2]

    def rotated(x_BTHK, turn_BTHC):
        pairs = np.asarray(x_BTHK, np.float64)
        product = (pairs[..., ::2] + 1j * pairs[..., 1::2]) * turn_BTHC
        return np.stack([product.real, product.imag], axis=-1).reshape(x_BTHK.shape)

    results = []
    for name in ("cpu", "tpu"):
        monkeypatch.setattr(layers, "platform", lambda name=name: name)
        out, pull_back = jax.vjp(lambda x: apply_rope(x, tables), x_BTHK)
        results.append((out, *pull_back(ct_BTHK)))
    tolerance = 1e-6 if dtype == jnp.float32 else 8e-3
    for found, given, turn in zip(results[0], (x_BTHK, ct_BTHK), (turn_BTHC, turn_BTHC.conj()), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), rotated(given, turn), rtol=tolerance, atol=tolerance)
    jax.tree.map(np.testing.assert_array_equal, *results)
