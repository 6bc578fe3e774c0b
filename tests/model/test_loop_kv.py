"""Loops that attend to the keys and values of the first loop, so that a cache needs one slot for all of them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.flops import cache_bytes
from mythos_jax.model.apply import apply
from mythos_jax.model.cache import init_cache, loop_cache_for
from mythos_jax.model.mythos import Mythos
from mythos_jax.training.depth import truncated_forward
from tests import reference
from tests.tiny import GQA_LAST, MLA, B, T, exact, halting, run, run_traced, some_tokens, variables

GQA = replace(GQA_LAST, loop_kv="first", lora_rank=0, n_shared_experts=0)
CONFIGS = {"gqa": GQA, "mla": replace(MLA, loop_kv="first")}
TRAINED, BEYOND = GQA.loops, GQA.loops + 2


def truth(config, loops, **policy):
    found = [reference.forward(config, exact(variables(config)), row, loops, **policy) for row in some_tokens()]
    return np.stack([row.logits for row in found])


def decoded(config, loops, policy=None):
    """Logits token by token."""
    cache, logits = init_cache(config, B, T, TRAINED), []
    for piece in np.split(some_tokens(), T, axis=1):
        out = run_traced(config, variables(config), piece, jnp.int32(loops), cache=cache, halting=policy)
        cache = out.cache
        logits.append(out.logits)
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("attention", CONFIGS)
def test_decoding_is_the_forward_pass(attention):
    """With one slot for all loops, also beyond those of training; the scan and the while loop."""
    config = CONFIGS[attention]
    for loops in TRAINED, BEYOND:
        expected = truth(config, loops)
        assert np.abs(expected - truth(replace(config, loop_kv="own"), loops)).max() > 1e-2
        full = run_traced(config, variables(config), some_tokens(), jnp.int32(loops)).logits
        np.testing.assert_allclose(full, expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(decoded(config, loops), full, rtol=0, atol=1e-5)
    scanned = run(config, variables(config), some_tokens(), loops=BEYOND).logits
    np.testing.assert_allclose(scanned, full, rtol=0, atol=1e-5)


def test_with_a_policy_and_any_rule_of_the_cache():
    policy = halting("latent", 0.25)
    full = run_traced(GQA, variables(GQA), some_tokens(), jnp.int32(BEYOND), halting=policy)
    assert len(np.unique(full.loops)) >= 2
    expected = truth(GQA, BEYOND, criterion="latent", threshold=0.25)
    np.testing.assert_allclose(full.logits, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(decoded(GQA, BEYOND, policy), full.logits, rtol=0, atol=1e-5)


def test_rows_of_different_depths_in_training():
    """The first loops of the deeper row have no gradient; keys and values are of its first loop all the same."""
    loops, run_rows = jnp.array([1, TRAINED]), partial(truncated_forward, backprop_loops=2)

    def logits(variables):
        model = Mythos(GQA)
        out = apply(run_rows, model, variables, some_tokens(), None, loops, None)
        return model.apply(variables, out.features, method="head")

    found = jax.jit(logits)(variables(GQA))
    for b in range(B):
        np.testing.assert_allclose(found[b], truth(GQA, int(loops[b]))[b], rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", CONFIGS)
def test_a_cache_has_one_slot_by_any_rule(attention):
    config = CONFIGS[attention]
    for rule in "all", "last", "first", "modulo:3":
        cache = init_cache(config, B, T, BEYOND, rule)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.prelude, cache.loop, cache.coda)))
        own = cache_bytes(replace(config, loop_kv="own"), BEYOND, "last")
        assert size == B * T * cache_bytes(config, BEYOND, rule) == B * T * own
        assert loop_cache_for(config, rule, BEYOND) == "all"  # nothing is approximate
        assert cache.max_loops is None
