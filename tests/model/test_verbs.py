"""begin, loop and finish: one loop at a time, and tokens that are gathered, joined and resumed at different loops, each
compared with a single call."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model.cache import init_cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import TokenState
from tests.tiny import (
    GQA,
    GQA_LAST,
    HUGINN,
    MLA,
    PARCAE,
    B,
    T,
    halting,
    run,
    run_traced,
    some_state,
    some_tokens,
    variables,
)

LOOPS = 4


def apply(config, forward):
    return Mythos(config).apply(variables(config), method=forward)


def at_depth(config, loops):
    """The model in one call, by a program that all depths share."""
    return run_traced(config, variables(config), some_tokens(), jnp.int32(loops), initial_state=some_state(config))


# Programs that tests share; all policies of a criterion have the same.
@partial(jax.jit, static_argnames="config")
def whole_token(config, cache, token_B, policy):
    def forward(model):
        tokens, new = model.begin(token_B[:, None], cache=cache)
        return model.finish(*model.loop(tokens, new, loops=LOOPS, halting=policy)[:2])

    return apply(config, forward)


@partial(jax.jit, static_argnames="config")
def begin(config, cache, token_B):
    return apply(config, lambda model: model.begin(token_B[:, None], cache=cache))


@partial(jax.jit, static_argnames=("config", "count"))
def some_loops(config, tokens, cache, loop_B, policy, count):
    """`count` loops, or all that remain (None)."""

    def forward(model):
        return model.loop(tokens, cache, loops=LOOPS, halting=policy, start=loop_B, count=count)[:2]

    return apply(config, forward)


@partial(jax.jit, static_argnames="config")
def finish(config, tokens, cache):
    return apply(config, lambda model: model.finish(tokens, cache))


@pytest.mark.parametrize(
    ("config", "cached"),
    [(GQA, True), (MLA, True), (HUGINN, False), (PARCAE, True)],
    ids=["gqa_act_cached", "mla_cached", "huginn", "parcae_cached"],
)
def test_stepping_by_hand_gives_every_depth(config, cached):
    """Finishing after loop t gives the model at t + 1 loops, and the tokens can still run deeper afterwards."""
    start = some_state(config)

    @jax.jit
    def step_through():
        def forward(model):
            empty = init_cache(config, B, T, LOOPS) if cached else None
            tokens, cache = model.begin(some_tokens(), initial_state=start, cache=empty)
            outs = []
            for t in range(LOOPS):
                tokens, cache, trace = model.loop(tokens, cache, loops=LOOPS, start=t, count=1)
                outs.append(model.finish(tokens, cache, trace))
            return outs

        return apply(config, forward)

    outs = step_through()
    for t, out in enumerate(outs):
        whole = at_depth(config, t + 1)
        np.testing.assert_allclose(out.logits, whole.logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(out.state, whole.state, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(out.loops, whole.loops)
    scanned = run(config, variables(config), some_tokens(), loops=LOOPS, initial_state=start).aux.change_LBT
    changes_LBT = np.stack([out.aux.change_LBT[0] for out in outs])
    np.testing.assert_allclose(changes_LBT, scanned, rtol=1e-4, atol=1e-6)
    if cached:
        np.testing.assert_array_equal(outs[-1].cache.length_B, [T] * B)


POLICIES = {
    "gqa_act": (GQA, halting("act", 0.9)),
    "mla_latent": (MLA, halting("latent", 0.15)),
    "mla_kl": (MLA, halting("kl", 0.02)),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_halting_can_be_stepped_through_by_hand(policy):
    """Token by token with a cache, one loop per call gives the same as one call per token: the exits, and the keys and
    values that halted tokens leave for deeper ones."""
    config, policy = POLICIES[policy]

    @jax.jit
    def decode_by_hand(cache, token_B):
        def forward(model):
            tokens, new = model.begin(token_B[:, None], cache=cache)
            for t in range(LOOPS):
                tokens, new, _ = model.loop(tokens, new, loops=LOOPS, halting=policy, start=t, count=1)
            return model.finish(tokens, new)

        return apply(config, forward)

    caches, seen = [init_cache(config, B, T, LOOPS)] * 2, set()
    for token_B in some_tokens().T:
        outs = whole_token(config, caches[0], token_B, policy), decode_by_hand(caches[1], token_B)
        np.testing.assert_array_equal(outs[0].loops, outs[1].loops)
        np.testing.assert_allclose(outs[0].logits, outs[1].logits, rtol=0, atol=1e-4)
        caches = [out.cache for out in outs]
        seen |= set(outs[0].loops.ravel().tolist())
    assert len(seen) >= 3, "the tokens must halt at different loops"


@pytest.mark.parametrize(
    ("config", "policy", "at_once"),
    [
        (GQA_LAST, None, False),
        (GQA_LAST, "latent", True),
        (MLA, "latent", False),
        (MLA, "kl", False),
        (MLA, "kl", True),
        (replace(PARCAE, initial_state="zeros"), None, True),
    ],
    ids=["gqa", "gqa_latent_at_once", "mla_latent", "mla_kl", "mla_kl_at_once", "parcae_at_once"],
)
def test_rows_at_different_loops_share_a_call(config, policy, at_once):
    """As in a batching server: rows at loops 3 and 0 of one batch continue, one loop per call or all remaining loops at
    once. Each gives the same as on its own, and so does the next token, which attends to their keys and values."""
    policy = policy and halting(policy, {"latent": 0.2, "kl": 0.05}[policy])
    prompt, token_B = some_tokens()[:, :4], some_tokens()[:, 4]

    before = run(config, variables(config), prompt, loops=LOOPS, halting=policy, cache=init_cache(config, B, T, LOOPS))
    truth = whole_token(config, before.cache, token_B, policy)
    tokens, cache = begin(config, before.cache, token_B)
    loop_B = jnp.zeros(B, jnp.int32)
    for _ in range(3):  # row 0 only: row 1 is given its last loop, and its result is discarded
        ahead, cache = some_loops(config, tokens, cache, loop_B + jnp.array([0, LOOPS]), policy, 1)
        tokens = TokenState.join([ahead.rows(slice(0, 1)), like(ahead, tokens).rows(slice(1, 2))], axis=0)
        loop_B = loop_B + jnp.array([1, 0])
    assert loop_B.tolist() == [3, 0]
    if at_once:
        tokens, cache = some_loops(config, tokens, cache, loop_B, policy, None)
    for _ in range(0 if at_once else LOOPS):
        tokens, cache = some_loops(config, tokens, cache, loop_B, policy, 1)
        loop_B += 1
    out = finish(config, tokens, cache)
    np.testing.assert_array_equal(out.loops, truth.loops)
    np.testing.assert_allclose(out.logits, truth.logits, rtol=0, atol=1e-4)

    following_B = some_tokens()[:, 5]
    following, expected = (whole_token(config, x.cache, following_B, policy).logits for x in (out, truth))
    np.testing.assert_allclose(following, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", ["latent", "kl"])
def test_a_paused_row_has_not_converged(policy):
    """Rows that stop at different loops of one call: the state of the one that waits does not move, and must not halt
    it. Run on to the end, both give what they give without a pause."""
    policy = halting(policy, {"latent": 0.1, "kl": 0.02}[policy])
    prompt, token_B = some_tokens()[:, :4], some_tokens()[:, 4]
    before = run(MLA, variables(MLA), prompt, loops=LOOPS, halting=policy, cache=init_cache(MLA, B, T, LOOPS))

    @jax.jit
    def decode(pauses_B):
        def forward(model):
            tokens, cache = model.begin(token_B[:, None], cache=before.cache)
            paused, cache, _ = model.loop(tokens, cache, loops=LOOPS, halting=policy, count=pauses_B)
            tokens, cache, _ = model.loop(paused, cache, loops=LOOPS, halting=policy, start=pauses_B)
            return paused.loops_BT, model.finish(tokens, cache)

        return apply(MLA, forward)

    truth = decode(jnp.array([0, 0]))[1]
    for pauses in ([1, 3], [3, 1], [2, 4]):
        ran, out = decode(jnp.array(pauses))
        np.testing.assert_array_equal(ran[:, 0], np.minimum(pauses, truth.loops[:, 0]))
        np.testing.assert_array_equal(out.loops, truth.loops)
        np.testing.assert_allclose(out.logits, truth.logits, rtol=0, atol=1e-4)


def like(prepared, tokens):
    """`tokens` with the fields that a call of `loop` adds, taken from `prepared`."""
    return tokens.replace(exit_kv=tokens.exit_kv or prepared.exit_kv, probe=tokens.probe or prepared.probe)


def test_tokens_of_one_row_are_split_and_joined():
    @jax.jit
    def halves():
        def forward(model):
            tokens, cache = model.begin(some_tokens(), cache=init_cache(MLA, B, T, LOOPS))
            first, cache, _ = model.loop(tokens.tokens(slice(0, 3)), cache, loops=LOOPS, count=2)
            second, cache, _ = model.loop(tokens.tokens(slice(3, T)), cache, loops=LOOPS, count=2)
            tokens, cache, _ = model.loop(TokenState.join([first, second]), cache, loops=LOOPS, start=2)
            return model.finish(tokens, cache)

        return apply(MLA, forward)

    whole = run(MLA, variables(MLA), some_tokens(), loops=LOOPS, initial_state=None)
    np.testing.assert_allclose(halves().logits, whole.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "cached"), [(GQA, True), (MLA, True), (HUGINN, False)], ids=["gqa", "mla", "huginn"]
)
def test_a_count_beyond_a_traced_depth_ends_at_the_depth(config, cached):
    """As many loops as the traced numbers allow, though a scan of `count` runs."""
    start = some_state(config)

    @jax.jit
    def go(loops, first):
        def forward(model):
            empty = init_cache(config, B, T, LOOPS) if cached else None
            tokens, cache = model.begin(some_tokens(), initial_state=start, cache=empty)
            tokens, cache, _ = model.loop(tokens, cache, loops=LOOPS, count=first)
            tokens, cache, trace = model.loop(tokens, cache, loops=loops, start=first, count=4)
            return model.finish(tokens, cache, trace)

        return apply(config, forward)

    for loops, first in [(3, 1), (4, 1), (4, 2), (2, 2)]:
        out = go(jnp.int32(loops), jnp.int32(first))
        whole = at_depth(config, loops)
        np.testing.assert_array_equal(out.loops, whole.loops)
        np.testing.assert_allclose(out.state, whole.state, rtol=0, atol=1e-4)
        np.testing.assert_allclose(out.logits, whole.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"start": 5}, "start: got 5, allowed: 0 to loops, 4"),
        ({"start": 2, "count": 3}, "count: got 3, allowed: 0 to 2, the loops that are left"),
        ({"count": -1, "loops": jnp.int32(3)}, "count: got -1, allowed: an integer >= 0"),
    ],
)
def test_invalid_ranges_of_loops_are_refused(keywords, message):
    def forward(model):
        return model.loop(model.begin(some_tokens())[0], **{"loops": LOOPS, **keywords})

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: apply(MLA, forward))
