"""Bounded caches and halting by logits, against a slow NumPy decoder: both attentions, ragged rows, in chunks."""

from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest

from mythos_jax.errors import ConfigError
from mythos_jax.flops import cache_bytes
from mythos_jax.model.cache import init_cache, loop_cache_for, loop_slots
from mythos_jax.model.halting import Halting
from tests.cached_reference import Decoder
from tests.tiny import GQA_LAST, MLA, B, T, exact, halting, run, some_tokens, variables

LOOPS = 5
LENGTHS = np.array([8, 6])
CUTS = [0, 4, 5, 6, 7, 8]  # a prompt, then token by token; the second row ends before the first
GQA = replace(GQA_LAST, lora_rank=0, n_shared_experts=0)
CONFIGS = {"gqa": GQA, "mla": MLA}


def decode(config, rule="all", policy=None):
    """Logits and loops of all pieces, [B, T, ...]."""
    cache, outs, tokens = init_cache(config, B, T, LOOPS, rule), [], some_tokens()
    for start, end in pairwise(CUTS):
        segments = (np.arange(start, end) < LENGTHS[:, None]).astype(np.int32)
        piece = np.where(segments, tokens[:, start:end], 7)
        out = run(config, variables(config), piece, loops=LOOPS, segment_ids=segments, cache=cache, halting=policy)
        cache = out.cache
        outs.append(out)
    return tuple(np.concatenate([getattr(out, name) for out in outs], axis=1) for name in ("logits", "loops"))


def check(config, got, rule="all", policy=None, margin=1e-3):
    """Compares each row with the slow decoder; returns the loops that the tokens ran."""
    logits, ran = got
    rules = {} if policy is None else {"criterion": policy.criterion, "threshold": policy.threshold}
    all_ran = []
    for b, length in enumerate(LENGTHS):
        row = Decoder(config, exact(variables(config)), LOOPS, rule, **rules)
        pieces = [(some_tokens()[b, start : min(end, length)], end - start > 1) for start, end in pairwise(CUTS)]
        truth = [row.feed(tokens, is_prompt) for tokens, is_prompt in pieces if len(tokens)]
        assert row.margin > margin
        np.testing.assert_array_equal(ran[b, :length], np.concatenate([loops for _, loops in truth]))
        expected = np.concatenate([logits for logits, _ in truth])
        np.testing.assert_allclose(logits[b, :length], expected, rtol=0, atol=1e-4)
        all_ran.append(ran[b, :length])
    return np.concatenate(all_ran)


@pytest.mark.parametrize(
    ("attention", "rule", "threshold"),
    [
        ("gqa", "modulo:2", None),
        ("mla", "last", None),
        ("gqa", "first", None),
        ("gqa", "modulo:2", 0.25),
        ("gqa", "modulo:3", 0.25),
        ("gqa", "modulo:4", 0.25),
        ("gqa", "first", 0.25),
        ("mla", "first", 0.5),
        ("mla", "last", 0.1),
        ("mla", "modulo:3", 0.2),
    ],
)
def test_bounded_cache(attention, rule, threshold):
    """A slot holds the last loop that a token ran in it; only slots that the token never reached hold its exit loop."""
    config, slots = CONFIGS[attention], loop_slots(rule, LOOPS)
    policy = threshold and halting("latent", threshold)
    got = decode(config, rule, policy)
    ran = check(config, got, rule, policy)
    if policy:
        assert len(set(ran)) >= 2, set(ran)
        # Some tokens wrap around to slots they have used, or exit before they reach every slot.
        assert ran.min() < slots or ran.max() > slots
    # Where slots are shared, the result is an approximation, as intended; otherwise it is exact, exits included.
    unbounded, _ = decode(config, "all", policy)
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
        ran = check(config, decode(config, "all", policy), "all", policy)
        means.append(ran.mean())
        before = before or run._cache_size()
        assert run._cache_size() == before
    assert means[0] != means[1]
    assert LOOPS > min(means)


def test_cosine():
    policy = halting("cosine", 0.01)
    ran = check(MLA, decode(MLA, "all", policy), "all", policy)
    assert len(set(ran)) >= 3


@pytest.mark.parametrize("rule", ["all", "last", "first", "modulo:3"])
@pytest.mark.parametrize("attention", CONFIGS)
def test_cache_bytes_agree_with_the_formula(attention, rule):
    cache = init_cache(CONFIGS[attention], B, T, LOOPS, rule)
    cache_size = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.prelude, cache.loop, cache.coda)))
    assert cache_size == B * T * cache_bytes(CONFIGS[attention], LOOPS, rule)


@pytest.mark.parametrize("rule", ["modulo:0", "modulo:", "modulo:-1", "latest", "", "first:2", None, 3])
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(
        ConfigError, match=f"loop_cache: got {rule!r}, allowed: all, last, first, or modulo:N with N >= 1"
    ):
        init_cache(MLA, B, T, LOOPS, rule)


def test_a_rule_under_which_no_loops_share_a_slot_is_all():
    names = ["all", "last", "first", "modulo:3"]
    assert [[loop_cache_for(CONFIGS["gqa"], rule, loops) for rule in names] for loops in (1, 2, 3, 4)] == [
        ["all", "all", "all", "all"],
        ["all", "last", "all", "all"],
        ["all", "last", "first", "all"],
        names,
    ]


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
