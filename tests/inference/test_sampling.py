"""Which tokens can be drawn, how often, and what the draw depends on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.inference.sampling import Sampling, position_noise, sample, truncate
from tests.tiny import HUGINN

N, V = 4000, 6
LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2, 1e-9]))  # most likely first: 1 3 4 2 0 5


@partial(jax.jit, static_argnames="seeds_apart")
def draws(temperature, top_k, top_p, seed=0, seeds_apart=False):
    """N tokens from the same logits, at N positions of one request, or at one position of N requests."""
    seed_B = seed + jnp.arange(N) * seeds_apart
    position_B = jnp.arange(N) * (not seeds_apart)
    logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (N, V))
    rows = [jnp.full(N, value) for value in (temperature, top_k, top_p)]
    return sample(logits_BV, Sampling(*rows, seed_B.astype(jnp.uint32)), position_B)


def shares(tokens):
    return np.bincount(tokens, minlength=V) / N


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("seeds_apart", [False, True])
def test_draws_follow_the_softmax(temperature, seeds_apart):
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    error = np.sqrt(expected * (1 - expected) / N)
    got = shares(draws(temperature, 0, 1.0, 1, seeds_apart))
    assert (np.abs(got - expected) <= 4 * error + 1 / N).all()


def test_temperature_zero_is_the_argmax_and_near_zero_is_finite():
    for temperature in (0.0, 1e-30):
        np.testing.assert_array_equal(draws(temperature, 0, 1.0), 1)


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (6, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_most_likely(top_k, kept):
    np.testing.assert_array_equal(np.unique(draws(1.0, top_k, 1.0)), kept)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-6, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.94, [1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_hold_the_mass(top_p, kept):
    np.testing.assert_array_equal(np.unique(draws(1.0, 0, top_p)), kept)
    descending = np.sort(np.exp(LOGITS))[::-1]
    assert descending[: len(kept)].sum() >= top_p > descending[: len(kept) - 1].sum()


def test_top_p_counts_mass_after_top_k():
    """Of tokens 1 and 3 alone, 1 holds 0.4 / 0.65 = 0.615."""
    assert set(np.unique(draws(1.0, 2, 0.6))) == {1}
    assert set(np.unique(draws(1.0, 2, 0.63))) == {1, 3}


def test_top_p_one_cuts_nothing_and_of_equals_the_first_stay():
    flat = np.zeros((1, 1000), np.float32)  # its cumulative sum rounds past 1 before the end
    cut = jax.jit(truncate)
    assert np.isfinite(cut(flat, np.zeros(1, int), np.ones(1))).all()
    (kept,) = np.isfinite(cut(flat, np.full(1, 7), np.ones(1)))
    np.testing.assert_array_equal(np.flatnonzero(kept), np.arange(7))


def test_what_is_not_cut_is_drawn_as_without_a_cut():
    """The noise belongs to tokens: a cut that leaves the drawn token leaves the draw."""
    free, cut = draws(1.0, 0, 1.0), draws(1.0, 3, 1.0)
    left = np.isin(free, [1, 3, 4])
    assert 0.8 < left.mean() < 0.9
    np.testing.assert_array_equal(cut[left], free[left])


def test_each_row_is_sampled_by_its_own_numbers():
    """In one batch rows get what they get where all rows are like them; greedy ones the argmax, beside random ones."""
    random = np.random.default_rng(0)
    logits_BV = random.normal(0, 3, (64, 50)).astype(np.float32)
    columns = random.choice([0.0, 0.7, 1.3], 64), random.choice([0, 1, 7], 64), random.choice([0.3, 0.9, 1.0], 64)
    rows = [jnp.asarray(x, dtype) for x, dtype in zip(columns, ("f4", "i4", "f4"), strict=True)]
    seed_B, position_B = jnp.asarray(random.integers(0, 9, 64), jnp.uint32), jnp.asarray(random.integers(0, 9, 64))
    call = jax.jit(sample)
    got = call(logits_BV, Sampling(*rows, seed_B), position_B)
    for b in range(64):
        alike = Sampling(*(jnp.full(64, x[b]) for x in rows), seed_B)
        assert got[b] == call(logits_BV, alike, position_B)[b]
    greedy = columns[0] == 0
    assert 0 < greedy.sum() < 64
    np.testing.assert_array_equal(got[greedy], logits_BV[greedy].argmax(-1))
    assert (got != logits_BV.argmax(-1)).any()


def test_seeds_and_positions_draw_differently_and_reproducibly():
    first = draws(1.0, 0, 1.0, 1)
    np.testing.assert_array_equal(draws(1.0, 0, 1.0, 1), first)
    assert 0.5 < np.mean(draws(1.0, 0, 1.0, 2) != first) < 0.9  # 1 - sum p^2 = 0.73 for independent draws


def test_noise_is_a_function_of_seed_and_position():
    noise = jax.jit(partial(position_noise, HUGINN))
    seeds = np.array([3, 4], np.uint32)
    whole = noise(seeds, np.broadcast_to(np.arange(6), (2, 6)))
    later = noise(seeds, np.broadcast_to(np.arange(2, 8), (2, 6)))
    swapped = noise(seeds[::-1].copy(), np.broadcast_to(np.arange(6), (2, 6)))
    np.testing.assert_array_equal(whole[:, 2:], later[:, :4])
    np.testing.assert_array_equal(whole[::-1], swapped)
    assert len(np.unique(whole)) > 0.99 * whole.size
