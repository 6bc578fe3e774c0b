"""`Mythos.halt`: stepping through depth and deciding outside the model, against a policy in one call of `loop`."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model.cache import init_cache
from mythos_jax.model.halting import CRITERIA, Halting, state_criterion_met
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.predictor import predicted_loops
from tests.model.test_cache import CUTS, LENGTHS, LOOPS
from tests.model.test_predictor import with_predictor
from tests.tiny import GQA, MLA, OURO, B, T, V, halting, run_traced, some_tokens, variables

MANUAL = Halting("manual")


@partial(jax.jit, static_argnames=("config", "by_hand"))
def call(config, weights, tokens_BT, segments_BT, cache, policy, by_hand):
    """Runs the next tokens of both rows; by hand, one loop after the other, each row's loop counted by itself."""

    def step(model, t, tokens, cache):
        # One token per row, as in a batching server: rows could be at different loops.
        start = t if tokens_BT.shape[1] > 1 else jnp.full(B, t)
        after, cache, _ = model.loop(tokens, cache, loops=LOOPS, halting=MANUAL, start=start, count=1)
        predicted_BT = None
        if policy.criterion == "predicted":
            predicted_BT = predicted_loops(weights["predictor"], tokens.inputs.injected_BTD, policy.threshold)
        states = after.state_BTD, tokens.state_BTD
        halts_BT = state_criterion_met(policy, jnp.full((B, 1), t), *states, after.survival_BT, predicted_BT)
        return model.halt(after, cache, halts_BT, start + 1)

    model = Mythos(config).bind(weights)
    tokens, cache = model.begin(tokens_BT, segment_ids=segments_BT, cache=cache)
    if not by_hand:
        tokens, cache, _ = model.loop(tokens, cache, loops=LOOPS, halting=policy)
        return tokens, model.finish(tokens, cache)
    first = model.loop(tokens, cache, loops=LOOPS, halting=MANUAL, count=0)[:2]  # with all fields, to carry them
    tokens, cache = jax.lax.fori_loop(0, LOOPS, lambda t, carry: step(model, t, *carry), first)
    return tokens, model.finish(tokens, cache)


POLICIES = {
    "moe_latent": (replace(GQA, readout="last", state_norm=True), halting("latent", 0.3, min_loops=2)),
    "mla_predicted": (MLA, halting("predicted", 1.6)),
    "ouro_gate": (OURO, halting("gate", 0.5)),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_deciding_outside_gives_what_the_policy_gives(policy):
    """A ragged prompt in one chunk, then token by token: states, loops, logits and the cache are equal to the bit."""
    config, policy = POLICIES[policy]
    weights, caches, ran = with_predictor(config), [init_cache(config, B, T, LOOPS)] * 2, []
    for start, end in zip(CUTS["chunk_then_tokens"], CUTS["chunk_then_tokens"][1:], strict=False):
        segments = (np.arange(start, end) < LENGTHS[:, None]).astype(np.int32)
        piece = weights, some_tokens()[:, start:end], segments
        (tokens, out), (truth, expected) = (
            call(config, *piece, cache, policy, by_hand) for cache, by_hand in zip(caches, [True, False], strict=True)
        )
        equal = jax.tree.map(lambda a, b: bool((a == b).all()), (tokens, out), (truth, expected))
        assert all(jax.tree.leaves(equal)), equal
        caches = out.cache, expected.cache
        ran += truth.loops_BT[segments != 0].tolist()
    assert len(set(ran)) >= 2, ran


def test_halted_tokens_stay_as_they_are():
    """By any rule: here one that no policy has, the token itself; also a second time and without a cache."""
    given = np.array([[1, 3, 2, 5, 5, 1, 4, 2], [2, 2, 5, 1, 3, 4, 5, 1]])

    @jax.jit
    def forward(given_BT):
        model = Mythos(MLA).bind(variables(MLA))

        def step(tokens, t):
            tokens = model.loop(tokens, loops=LOOPS, halting=MANUAL, start=t, count=1)[0]
            tokens, _ = model.halt(tokens, None, given_BT <= t + 1, t + 1)
            return tokens, tokens.state_BTD

        first = model.loop(model.begin(some_tokens())[0], loops=LOOPS, halting=MANUAL, count=0)[0]
        tokens, states = jax.lax.scan(step, first, jnp.arange(LOOPS))
        return tokens.loops_BT, states

    loops, states = forward(given)
    np.testing.assert_array_equal(loops, given)
    for t in range(1, LOOPS):
        stays = given <= t
        np.testing.assert_array_equal(states[t][stays], states[t - 1][stays])
        assert (states[t][~stays] != states[t - 1][~stays]).any(-1).all()


def test_the_rule_of_the_documentation():
    """The function printed in docs/halting.md, on texts of one token, which no neighbour influences: each runs the
    fewest loops after which the plain model is sure."""
    page = (Path(__file__).parents[2] / "docs" / "halting.md").read_text()
    code = page.split("```python\n")[1].split("\n\n\nlm = ")[0]
    printed = {}
    exec(code, printed)
    tokens, sure = np.arange(V)[:, None], 0.4
    call = jax.jit(lambda: printed["think_until_sure"](Mythos(MLA).bind(variables(MLA)), tokens, LOOPS, sure))
    outs = [run_traced(MLA, variables(MLA), tokens, jnp.int32(t + 1)) for t in range(LOOPS)]
    best = np.stack([sureness(out.logits)[:, 0] for out in outs])
    assert np.abs(best - sure).min() > 1e-4
    expected = np.where((best >= sure).any(0), (best >= sure).argmax(0) + 1, LOOPS)
    out = call()
    np.testing.assert_array_equal(out.loops[:, 0], expected)
    assert len(set(expected)) >= 3, expected
    np.testing.assert_allclose(sureness(out.logits)[:, 0], best[expected - 1, np.arange(V)], rtol=0, atol=1e-5)


def sureness(logits):
    return np.asarray(jax.nn.softmax(logits).max(-1))


@pytest.mark.parametrize(
    ("config", "ran", "message"),
    [
        (GQA, 0, "halting criterion: got 'manual', allowed with readout act: act"),
        (MLA, 1, r"halt: got tokens that have run no loop with Halting\('manual'\), allowed: those that have"),
        (replace(MLA, freeze_halted=False), 0, "got 'manual', allowed only for a model with freeze_halted true"),
    ],
)
def test_what_cannot_be_halted_by_hand_is_refused(config, ran, message):
    def forward(model):
        tokens = model.begin(some_tokens())[0]
        if ran:
            tokens = model.loop(tokens, loops=ran)[0]
        return model.halt(tokens, None, jnp.ones((B, T), bool), 1)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: Mythos(config).apply(variables(config), method=forward))


def test_nobody_can_ask_for_it_by_name():
    """A request with it would only run all its loops."""
    assert "manual" not in CRITERIA
    with pytest.raises(ValueError, match="halting criterion: got 'manual', allowed: act, latent, "):
        Halting.parse("manual")
    with pytest.raises(ValueError, match=r"halting threshold: got 0\.1, allowed with manual: none"):
        Halting("manual", 0.1)
