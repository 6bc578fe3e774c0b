"""Bounded caches and halting by logits, against a slow NumPy decoder: both attentions, ragged rows, in chunks."""

from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest

from mythos_jax.flops import cache_bytes
from mythos_jax.model.cache import init_cache
from mythos_jax.model.halting import Halting
from tests.cached_reference import Decoder
from tests.tiny import GQA_LAST, MLA, B, T, exact, halting, run, some_tokens, variables

LOOPS = 5
LENGTHS = np.array([8, 6])
CUTS = [0, 4, 5, 6, 7, 8]  # a prompt, then token by token; the second row ends before the first
GQA = replace(GQA_LAST, lora_rank=0, n_shared_experts=0)
CONFIGS = {"gqa": GQA, "mla": MLA}


def decode(config, slots=None, policy=None):
    """Logits and loops of all pieces, [B, T, ...]."""
    cache, outs, tokens = init_cache(config, B, T, LOOPS, slots), [], some_tokens()
    for start, end in pairwise(CUTS):
        segments = (np.arange(start, end) < LENGTHS[:, None]).astype(np.int32)
        piece = np.where(segments, tokens[:, start:end], 7)
        out = run(config, variables(config), piece, loops=LOOPS, segment_ids=segments, cache=cache, halting=policy)
        cache = out.cache
        outs.append(out)
    return tuple(np.concatenate([getattr(out, name) for out in outs], axis=1) for name in ("logits", "loops"))


def check(config, got, slots=None, policy=None, margin=1e-3):
    """Compares each row with the slow decoder; returns the loops that the tokens ran."""
    logits, ran = got
    rules = {} if policy is None else {"criterion": policy.criterion, "threshold": policy.threshold}
    all_ran = []
    for b, length in enumerate(LENGTHS):
        row = Decoder(config, exact(variables(config)), LOOPS, slots, **rules)
        pieces = [(some_tokens()[b, start : min(end, length)], end - start > 1) for start, end in pairwise(CUTS)]
        truth = [row.feed(tokens, is_prompt) for tokens, is_prompt in pieces if len(tokens)]
        assert row.margin > margin
        np.testing.assert_array_equal(ran[b, :length], np.concatenate([loops for _, loops in truth]))
        expected = np.concatenate([logits for logits, _ in truth])
        np.testing.assert_allclose(logits[b, :length], expected, rtol=0, atol=1e-4)
        all_ran.append(ran[b, :length])
    return np.concatenate(all_ran)


@pytest.mark.parametrize(
    ("attention", "slots", "threshold"),
    [
        ("gqa", 2, None),
        ("mla", 1, None),
        ("gqa", 2, 0.25),
        ("gqa", 3, 0.25),
        ("gqa", 4, 0.25),
        ("mla", 1, 0.1),
        ("mla", 3, 0.2),
    ],
)
def test_bounded_cache(attention, slots, threshold):
    """A slot holds the last loop that a token ran in it; only slots that the token never reached hold its exit loop."""
    config = CONFIGS[attention]
    policy = threshold and halting("latent", threshold)
    got = decode(config, slots, policy)
    ran = check(config, got, slots, policy)
    if policy:
        assert len(set(ran)) >= 2, set(ran)
        # Some tokens wrap around to slots they have used, or exit before they reach every slot.
        assert ran.min() < slots if slots >= 3 else ran.max() > slots
    # Where slots are shared, the result is an approximation, as intended; otherwise it is exact, exits included.
    unbounded, _ = decode(config, None, policy)
    assert (np.abs(got[0][0] - unbounded[0]).max() > 1e-3) == (ran.max() > slots)


@pytest.mark.parametrize("attention", CONFIGS)
@pytest.mark.parametrize(
    ("criterion", "thresholds"), [("kl", (3e-3, 3e-2)), ("entropy", (1e-2, 0.05)), ("argmax", (1, 2))]
)
def test_halting_by_logits(attention, criterion, thresholds):
    """The prompt runs all loops, and each later token as many as it needs; one program serves all thresholds."""
    config, before, means = CONFIGS[attention], None, []
    for threshold in thresholds:
        policy = halting(criterion, float(threshold))
        ran = check(config, decode(config, None, policy), None, policy)
        means.append(ran.mean())
        before = before or run._cache_size()
        assert run._cache_size() == before
    assert means[0] != means[1]
    assert LOOPS > min(means)


def test_cosine():
    policy = halting("cosine", 0.01)
    ran = check(MLA, decode(MLA, None, policy), None, policy)
    assert len(set(ran)) >= 3


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("attention", CONFIGS)
def test_cache_bytes_agree_with_the_formula(attention, slots):
    cache = init_cache(CONFIGS[attention], B, T, LOOPS, slots)
    cache_size = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.prelude, cache.loop, cache.coda)))
    assert cache_size == B * T * cache_bytes(CONFIGS[attention], slots or LOOPS)


def test_zero_slots_are_refused():
    with pytest.raises(ValueError, match="loop_cache_slots: got 0, allowed: an integer >= 1, or None"):
        init_cache(MLA, B, T, LOOPS, 0)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"threshold": float("nan")}, "halting threshold: got nan, allowed: a number >= 0"),
        ({"threshold": -1.0}, "halting threshold: got -1.0, allowed: a number >= 0"),
        ({"max_loops": 0}, "halting max_loops: got 0, allowed: a number >= 1"),
        ({"criterion": "gate", "threshold": 90}, "halting threshold: got 90, allowed with gate: a number from 0 to 1"),
    ],
)
def test_invalid_numbers_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Halting(**{"criterion": "kl", **numbers})
