"""Decoding with a cache against the NumPy reference, which has none: by token, in chunks, ragged, with halting."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model.cache import init_cache
from tests import reference
from tests.tiny import (
    GQA,
    GQA_LAST,
    MLA,
    MLA_ACT,
    OURO,
    B,
    T,
    exact,
    halting,
    run,
    run_traced,
    some_tokens,
    variables,
)

LOOPS = 5  # more than the trained depth, 3
CHUNK = 4
LENGTHS = np.array([8, 5])


def run_in_pieces(config, tokens_BT, cuts, lengths=LENGTHS, call=run, loops=LOOPS, cache=None, **keywords):
    """Feeds tokens [cuts[i], cuts[i + 1]) piece by piece; positions past a row's length are padding. cache: an empty
    one (default: with a slot for each loop)."""
    cache = init_cache(config, len(lengths), T, np.max(loops)) if cache is None else cache
    outs = []
    for start, end in pairwise(cuts):
        segments = (np.arange(start, end) < lengths[:, None]).astype(np.int32)
        # The contents of the padding must not matter.
        tokens = np.where(segments, tokens_BT[:, start:end], 7)
        out = call(config, variables(config), tokens, loops=loops, segment_ids=segments, cache=cache, **keywords)
        cache = out.cache
        outs.append(out)
    logits, ran = (np.concatenate([getattr(out, name) for out in outs], axis=1) for name in ("logits", "loops"))
    return logits, ran, cache


def check_rows(config, logits, ran, loops=(LOOPS, LOOPS), tokens=None, **keywords):
    tokens = some_tokens() if tokens is None else tokens
    for b, length in enumerate(LENGTHS):
        truth = reference.forward(config, exact(variables(config)), tokens[b, :length], loops[b], **keywords)
        np.testing.assert_allclose(logits[b, :length], truth.logits, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(ran[b, :length], truth.loops)


CUTS = {
    "token_by_token": list(range(T + 1)),
    "chunks": [0, CHUNK, 2 * CHUNK],
    "chunk_then_tokens": [0, CHUNK, 5, 6, 7, 8],
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_cached_rows_equal_rows_on_their_own(config, cuts):
    logits, ran, cache = run_in_pieces(config, some_tokens(), CUTS[cuts])
    check_rows(config, logits, ran)
    np.testing.assert_array_equal(cache.length_B, LENGTHS)  # padding is not counted


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_rows_continue_after_a_padded_prefill(config):
    """After a ragged prefill, a row's next token directly follows its own last token."""
    tokens, prompt = some_tokens(), np.array([3, 1])
    cache, got = init_cache(config, B, T, LOOPS), [[], []]
    out = run(
        config,
        variables(config),
        tokens[:, :CHUNK],
        loops=LOOPS,
        segment_ids=(np.arange(CHUNK) < prompt[:, None]).astype(np.int32),
        cache=cache,
    )
    for b in range(B):
        got[b] += list(out.logits[b, : prompt[b]])
    for step in range(4):
        token = tokens[np.arange(B), prompt + step][:, None]
        out = run(config, variables(config), token, loops=LOOPS, segment_ids=np.ones((B, 1), np.int32), cache=out.cache)
        for b in range(B):
            got[b].append(out.logits[b, 0])
    for b in range(B):
        truth = reference.forward(config, exact(variables(config)), tokens[b, : prompt[b] + 4], LOOPS)
        np.testing.assert_allclose(np.stack(got[b]), truth.logits, rtol=0, atol=1e-4)


POLICIES = {
    "gqa_act": (GQA, "act", 0.9),
    "gqa_latent": (GQA_LAST, "latent", 0.25),
    "mla_act": (MLA_ACT, "act", 0.9),
    "mla_latent": (MLA, "latent", 0.1),
    "gqa_cosine": (GQA_LAST, "cosine", 0.02),
    "ouro_gate": (OURO, "gate", 0.5),
}


@pytest.mark.parametrize(
    ("policy", "cuts"),
    [(policy, "token_by_token") for policy in POLICIES]
    + [(policy, "chunk_then_tokens") for policy in ("gqa_act", "mla_latent")],
)
def test_halting_with_cache_equals_full_forward(policy, cuts):
    """The spread of exits and the margins to the threshold are asserted in test_halting.py, for the same inputs."""
    config, criterion, threshold = POLICIES[policy]
    logits, ran, _ = run_in_pieces(config, some_tokens(), CUTS[cuts], halting=halting(criterion, threshold))
    check_rows(config, logits, ran, criterion=criterion, threshold=threshold)


def test_depth_by_row_with_cache():
    """Rows past their depth are frozen. Rows within it cache every loop, also for tokens that ACT has halted: here the
    tokens of the first chunk all halt within 2 loops, and later tokens that run 5 loops attend to them."""
    depths, tokens = np.array([5, 2], np.int32), some_tokens(23)
    config = replace(GQA, act_threshold=0.3)
    logits, ran, _ = run_in_pieces(config, tokens, CUTS["chunk_then_tokens"], call=run_traced, loops=depths)
    assert ran[0, :CHUNK].max() == 2
    assert ran[0, CHUNK:].max() == 5
    check_rows(config, logits, ran, loops=depths, tokens=tokens)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [(GQA, 2 * GQA.n_kv_heads * 8), (MLA, MLA.kv_lora_rank + MLA.qk_rope_head_dim)],
    ids=["gqa", "mla"],
)
def test_cache_bytes(config, numbers):
    """Per token: 4 bytes x numbers for each layer outside the loop, and per loop for each layer inside it."""
    cache = init_cache(config, B, T, LOOPS)
    cache_size = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.prelude, cache.loop, cache.coda)))
    assert cache_size == B * T * 4 * numbers * (config.prelude_layers + config.coda_layers + config.loop_layers * LOOPS)
    assert cache.capacity == T


def test_bounded_cache_shares_slots():
    for rule, slots in [("modulo:2", 2), ("last", 1), ("first", 2)]:
        cache = init_cache(MLA, B, T, LOOPS, rule)
        assert [layer.kv.keys.shape[0] for layer in cache.loop] == [slots]
        assert cache.max_loops is None


def test_more_loops_than_slots_are_refused():
    with pytest.raises(ValueError, match=r"loops: got 6, allowed: at most the 5 the cache was made for"):
        run(GQA, variables(GQA), jnp.zeros((B, 1), jnp.int32), loops=6, cache=init_cache(GQA, B, T, LOOPS))
