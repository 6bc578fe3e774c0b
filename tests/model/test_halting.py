"""Halting against the NumPy reference, ACT's arithmetic against a plain loop, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model.cache import init_cache
from mythos_jax.model.halting import Halting, act_weight
from mythos_jax.model.mythos import Mythos
from tests import reference
from tests.model.test_cache import LOOPS, POLICIES
from tests.tiny import GQA, GQA_LAST, MLA, OURO, B, T, V, exact, halting, run, some_tokens, variables


def truths(config, criterion, threshold, loops=LOOPS, **keywords):
    return [
        reference.forward(
            config, exact(variables(config)), tokens, loops, criterion=criterion, threshold=threshold, **keywords
        )
        for tokens in some_tokens()
    ]


def margin(truth, criterion, threshold):
    """The smallest distance to the threshold of any token in a loop that it ran."""
    if criterion in ("cosine", "kl"):
        distance = np.abs(truth.measures / threshold - 1)
        return distance[~truth.halted[-len(distance) :]].min()
    if criterion == "latent":
        distance = np.abs(truth.changes / threshold - 1)
    elif criterion == "gate":
        distance = np.abs(np.cumprod(1 - truth.probabilities, axis=0) - (1 - threshold))
    else:
        distance = np.abs(np.cumsum(truth.probabilities * ~truth.halted, axis=0) - threshold)
    return distance[~truth.halted].min()


@pytest.mark.parametrize("policy", POLICIES)
def test_halting_equals_reference(policy):
    config, criterion, threshold = POLICIES[policy]
    out = run(config, variables(config), some_tokens(), loops=LOOPS, halting=halting(criterion, threshold))
    rows = truths(config, criterion, threshold)
    assert len(np.unique([row.loops for row in rows])) >= 3, "the tokens must halt at different loops"
    assert min(margin(row, criterion, threshold) for row in rows) > 1e-3
    for b, row in enumerate(rows):
        np.testing.assert_array_equal(out.loops[b], row.loops)
        np.testing.assert_allclose(out.logits[b], row.logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(out.state[b], row.state, rtol=0, atol=1e-4)
        if config.readout == "last":  # frozen: the state is that of the exit loop
            exits = row.states[row.loops - 1, np.arange(len(row.loops))]
            np.testing.assert_allclose(out.state[b], exits, rtol=0, atol=1e-4)
    if config.feed_forward == "moe":  # frozen tokens do not count
        np.testing.assert_array_equal(out.aux.expert_load, sum(row.load for row in rows))


def test_at_threshold_1_all_loops_run_however_sure_the_gate_is():
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 60 if path[-1].key == "halt_bias" else x, variables(OURO)
    )  # sigmoid(60) is 1 in float32
    for threshold, loops in [(1.0, LOOPS), (0.999, 1)]:
        out = run(OURO, weights, some_tokens(), loops=LOOPS, halting=halting("gate", threshold))
        np.testing.assert_array_equal(out.loops, loops)


@pytest.mark.parametrize("policy", ["gqa_act", "mla_latent"])
def test_loop_bounds_and_threshold_are_traced(policy):
    """The compiled call of the test above serves every policy of its criterion."""
    config, criterion, threshold = POLICIES[policy]
    compiled = run._cache_size()
    for scale, min_loops, max_loops in [(1.0, 3, 100), (1.0, 1, 2), (0.5, 1, 100), (0.5, 2, 4)]:
        out = run(
            config,
            variables(config),
            some_tokens(),
            loops=LOOPS,
            halting=halting(criterion, scale * threshold, min_loops, max_loops),
        )
        rows = truths(config, criterion, scale * threshold, min(LOOPS, max_loops), min_loops=min_loops)
        for b, row in enumerate(rows):
            np.testing.assert_array_equal(out.loops[b], row.loops)
            np.testing.assert_allclose(out.logits[b], row.logits, rtol=0, atol=1e-4)
    assert run._cache_size() <= compiled + 1


def test_halting_by_logits_in_a_full_forward_pass(monkeypatch):
    """Without a cache, the coda sees every token's state after the same loop, and logits exist for a few positions at a
    time."""
    config = replace(MLA, hidden_dim=44)  # only logits are V wide
    monkeypatch.setattr("mythos_jax.ops.chunked.CHUNK_LENGTH", 3)
    monkeypatch.setattr("mythos_jax.ops.chunked.MAX_UNCHUNKED_VOCAB", 1)
    policy = halting("kl", 0.02)

    def without_head(model, tokens_BT, loops, halting):
        tokens, _ = model.begin(tokens_BT)
        tokens, _, trace = model.loop(tokens, loops=loops, halting=halting)
        return model.finish(tokens, trace=trace, logits=False)

    def forward(policy):
        return Mythos(config).apply(variables(config), some_tokens(), loops=LOOPS, halting=policy, method=without_head)

    traced = jax.jit(forward).trace(policy)
    assert f"[{B},3,{V}]" in str(traced.jaxpr) or f"[{B},6,{V}]" in str(traced.jaxpr)
    assert f"[{B},{T},{V}]" not in str(traced.jaxpr)
    assert f"[{B},{2 * T},{V}]" not in str(traced.jaxpr)
    out = traced.lower().compile()(policy)
    rows = truths(config, "kl", 0.02)
    assert len(np.unique([row.loops for row in rows])) >= 3, "the tokens must halt at different loops"
    assert min(margin(row, "kl", 0.02) for row in rows) > 1e-3
    for b, row in enumerate(rows):
        np.testing.assert_array_equal(out.loops[b], row.loops)
        np.testing.assert_allclose(out.state[b], row.state, rtol=0, atol=1e-4)
        logits = out.features[b] @ variables(config)["params"]["embedding"].T
        np.testing.assert_allclose(logits, row.logits, rtol=0, atol=1e-4)


def test_halted_tokens_evolve_without_freezing():
    """As in the original: a halted token has weight 0, but its state and keys are still updated, so the result is the
    same as without halting."""
    config = replace(GQA, freeze_halted=False)
    out = run(config, variables(config), some_tokens(), loops=LOOPS, halting=halting("act", GQA.act_threshold))
    for b in range(B):
        truth = reference.forward(config, exact(variables(config)), some_tokens()[b], LOOPS)
        np.testing.assert_allclose(out.logits[b], truth.logits, rtol=0, atol=1e-4)


def simulate(probabilities, threshold, remainder, min_loops):
    """ACT for one token, as Graves defines it: weights until the cumulative probability reaches the threshold."""
    weights, cumulative = [], 0.0
    for t, p in enumerate(probabilities):
        if t + 1 >= min_loops and cumulative + p >= threshold:
            return [*weights, max(1 - cumulative, 0)] + [0.0] * (len(probabilities) - t - 1)
        if remainder and t == len(probabilities) - 1:
            return [*weights, max(1 - cumulative, 0)]
        weights.append(min(p, max(1 - cumulative, 0)))
        cumulative += p
    return weights


@pytest.mark.parametrize("min_loops", [1, 3])
@pytest.mark.parametrize("remainder", [True, False])
@pytest.mark.parametrize("loops", [1, 2, 6])
def test_act_weights(loops, remainder, min_loops):
    probabilities = np.random.default_rng(loops).uniform(0, 0.5, (loops, 50)).astype(np.float32)
    probabilities[:, :10] /= 10  # these never reach the threshold
    probabilities[:, 40:] = 0.95  # with min_loops 3, the weights of these would exceed 1
    threshold, weights = 0.9, []
    cumulative, running = jnp.zeros((50, 1)), jnp.ones((50, 1), bool)
    for t, p in enumerate(probabilities[..., None]):
        last = jnp.full((50, 1), t == loops - 1) if remainder else None
        weight, total, halts = act_weight(p, cumulative, threshold, jnp.full((50, 1), t + 1 >= min_loops), last)
        weights.append(np.where(running, weight, 0)[:, 0])
        cumulative, running = jnp.where(running, total, cumulative), running & ~halts
    weights, running = np.stack(weights), np.asarray(running[:, 0])

    expected = [simulate(list(map(float, column)), threshold, remainder, min_loops) for column in probabilities.T]
    np.testing.assert_allclose(weights.T, expected, rtol=0, atol=1e-6)
    total = weights.sum(0)
    assert running[:10].all()
    if remainder:
        np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(total[~running], 1, rtol=0, atol=1e-6)
        assert (total[:10] < 0.9).all()


@pytest.mark.parametrize(
    ("config", "criterion", "cached", "message"),
    [
        (MLA, "act", False, r"halting criterion: got 'act', allowed with readout last: latent, cosine, kl, entropy, a"),
        (GQA, "kl", False, r"halting criterion: got 'kl', allowed with readout act: act"),
        (GQA, "kl", True, r"halting criterion: got 'kl', allowed with readout act: act"),
        (
            replace(MLA, freeze_halted=False),
            "kl",
            False,
            r"halting criterion: got 'kl' on a model with freeze_halted f",
        ),
        (GQA, "latent", False, r"halting criterion: got 'latent', allowed with readout act: act"),
        (replace(GQA, freeze_halted=False), "act", True, r"halting: got a policy with a cache on a model with freeze_"),
    ],
)
def test_refusals(config, criterion, cached, message):
    cache = init_cache(config, B, 8, LOOPS) if cached else None
    with pytest.raises(ValueError, match=message):
        run(config, variables(config), some_tokens(), loops=LOOPS, halting=Halting(criterion), cache=cache)


def test_unknown_criterion_is_refused():
    with pytest.raises(
        ValueError, match=r"halting criterion: got 'kI', allowed: act, latent, cosine, kl, entropy, argmax"
    ):
        Halting("kI")


def test_default_thresholds():
    assert Halting("latent").resolved_threshold == 0.03
    by_default, explicit = (
        run(GQA, variables(GQA), some_tokens(), loops=LOOPS, halting=policy)
        for policy in (Halting("act"), halting("act", GQA.act_threshold))
    )
    np.testing.assert_allclose(by_default.logits, explicit.logits, rtol=0, atol=1e-5)
    assert jax.tree.leaves(Halting("latent", threshold=0.1)) == [0.1, 1]  # a pytree with numbers that can be traced
    assert GQA_LAST.readout == "last"
