"""Speculative decoding against plain greedy decoding at full depth, and the work it does."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.inference.generate import generate
from mythos_jax.inference.speculative import speculate, stream_drafts
from mythos_jax.model.cache import init_cache
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from tests.tiny import GQA, GQA_LAST, MLA, V, run, some_tokens, variables

T, N, LOOPS = 5, 11, 4
LENGTHS = np.array([5, 2, 3])
PROMPTS = some_tokens(1, (3, T))
UNUSED = V - 1
MLA_MOE = replace(MLA, feed_forward="moe", n_experts=5, experts_per_token=2, expert_dim=16)


def plain_and_speculative(config, d, n, **keywords):
    """By default with a stop token that never comes, so that tests share compiled programs."""
    arguments = (Mythos(config), variables(config), PROMPTS, LENGTHS)
    keywords = {"max_new_tokens": N, "loops": LOOPS, "stop_tokens": [UNUSED], **keywords}
    return generate(*arguments, **keywords), speculate(*arguments, draft_loops=d, draft_tokens=n, **keywords)


def check_same(plain, result):
    for name in ("tokens", "lengths", "loops"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(result, name))


def check_rejections(result, n):
    assert 0 < result.acceptance < 1, "drafts must be right at times and wrong at times"
    assert len(set(np.asarray(result.accepted / result.drafted))) > 1, "rows must accept different counts"
    # A round adds what it accepts and one token more; the first token is the prefill's, the last round may be cut.
    added = np.asarray(result.accepted + result.drafted / n)
    assert (added >= N - 1).all()
    assert (added <= N - 1 + n).all()


def test_same_tokens_as_plain_greedy_decoding():
    plain, result = plain_and_speculative(GQA, 1, 3)
    check_same(plain, result)
    check_rejections(result, 3)


def test_stop_tokens_cut_a_round():
    free, _ = plain_and_speculative(GQA, 1, 3)
    for stop in {int(free.tokens[0, 3]), int(free.tokens[1, 4])}:
        plain, result = plain_and_speculative(GQA, 1, 3, stop_tokens=[stop])
        check_same(plain, result)
        assert (plain.lengths < N).any()


def test_pieces_side_by_side_are_the_whole():
    plain, result = plain_and_speculative(GQA, 1, 3)
    rows = [[] for _ in LENGTHS]
    pieces = stream_drafts(
        Mythos(GQA),
        variables(GQA),
        PROMPTS,
        LENGTHS,
        max_new_tokens=N,
        loops=LOOPS,
        stop_tokens=[UNUSED],
        draft_loops=1,
        every=1,
    )
    for piece in pieces:
        for row, tokens, length in zip(rows, piece.tokens, piece.lengths, strict=True):
            row += list(tokens[:length])
    np.testing.assert_array_equal(rows, plain.tokens)
    np.testing.assert_array_equal(piece.accepted, result.accepted)


def test_halting_before_at_and_after_the_depth_of_the_draft():
    ran = set()
    for threshold in (0.0, 0.25, 1.0):
        plain, result = plain_and_speculative(MLA_MOE, 2, 2, halting=Halting("latent", threshold))
        check_same(plain, result)
        ran |= set(np.asarray(plain.loops).ravel().tolist())
        if not threshold:  # no token halts
            check_rejections(result, 2)
    assert ran == {1, 2, 3, 4}


def test_drafts_at_full_depth_are_all_accepted():
    plain, result = plain_and_speculative(GQA_LAST, LOOPS, 4)
    check_same(plain, result)
    assert result.acceptance == 1
    assert int(result.rounds) == -(-(N - 1) // 5)


def test_no_loop_is_run_twice():
    """Loops have rows of their own in the LoRA's table: those that a call must not run are made NaN."""
    config, d, tokens = replace(GQA, lora_loops=LOOPS), 2, PROMPTS[:, :3]

    def without(rows):
        def spoil(path, leaf):
            lora_table = path[-1].key == "scale" and path[-2].key == "lora"
            return np.where(np.isin(np.arange(LOOPS), rows)[:, None], np.nan, leaf) if lora_table else leaf

        return jax.tree_util.tree_map_with_path(spoil, variables(config))

    truth = run(config, variables(config), tokens, loops=LOOPS, cache=init_cache(config, 3, 3, LOOPS))

    @jax.jit
    def draft(variables):
        def forward(model):
            tokens_3, cache = model.begin(tokens, cache=init_cache(config, 3, 3, LOOPS))
            tokens_3, cache, _ = model.loop(tokens_3, cache, loops=LOOPS, count=d)
            return tokens_3, model.finish(tokens_3, cache)

        return Mythos(config).apply(variables, method=forward)

    @jax.jit
    def verify(variables, drafted, cache):
        def forward(model):
            drafted_3, new_cache, _ = model.loop(drafted, cache, loops=LOOPS, start=d)
            return model.finish(drafted_3, new_cache)

        return Mythos(config).apply(variables, method=forward)

    drafted, out = draft(without([2, 3]))
    assert np.isfinite(out.logits).all()
    cache = out.cache
    out = verify(without([0, 1]), drafted, cache)
    np.testing.assert_allclose(out.logits, truth.logits, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(out.loops, truth.loops)
    cache = cache.replace(length_B=jnp.zeros(3, jnp.int32))
    assert np.isnan(run(config, without([1]), tokens, loops=LOOPS, cache=cache).logits).any()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"draft_loops": 0}, "draft_loops: got 0, allowed: 1 to loops, 4"),
        ({"draft_loops": 5}, "draft_loops: got 5, allowed: 1 to loops, 4"),
        (
            {"halting": Halting("kl")},
            "halting criterion: got 'kl', allowed: act, latent, cosine, predicted, gate with draft_",
        ),
        ({"temperature": 0.8}, r"temperature: got 0.8, allowed: 0 \(greedy\) with draft_loops"),
        ({"loop_cache": "first"}, r"loop_cache: got first, allowed: all \(a slot for each loop\) with draft_loops"),
        ({"draft_tokens": 0}, "draft_tokens: got 0, allowed: 1 to 15, one below max_seq_len"),
    ],
)
def test_bad_input(keywords, message):
    keywords = {"draft_loops": 1, "loops": LOOPS, **keywords}
    with pytest.raises(ValueError, match=message):
        speculate(Mythos(MLA), variables(MLA), PROMPTS, LENGTHS, max_new_tokens=N, **keywords)
