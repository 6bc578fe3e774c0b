"""The depth predictor: what the head can learn, the budgets it keeps, and how it is read back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from mythos_jax.errors import ConfigError
from mythos_jax.model.predictor import loops_at, predicted_loops
from mythos_jax.runs.load import _load_predictor
from mythos_jax.training.predictor import calibrate, fit, save_predictor

DIM, LOOPS = 8, 6


@pytest.fixture(scope="module")
def synthetic():
    """Tokens of three kinds, marked by the first channels, that converge after 1, 3 and 6 loops; and a head trained on
    them."""
    random = np.random.default_rng(0)
    kind = random.integers(0, 3, 6000)
    features = 0.3 * random.standard_normal((6000, DIM)) + 2 * np.eye(3, DIM)[kind]
    needed = np.array([1, 3, 6])[kind]
    # Noise with mean 1 over the orders of magnitude that real labels span.
    noise = random.lognormal(-0.5, 1.0, (6000, LOOPS - 1))
    excess = np.where(np.arange(1, LOOPS) < needed[:, None], 0.5 * noise, 1e-5 * noise)
    features, excess = features.astype(np.float32), excess.astype(np.float32)
    return features, excess, needed, fit(features[:4000], excess[:4000], steps=400)


def test_head_learns_which_tokens_need_which_depth(synthetic):
    features, excess, needed, head = synthetic
    predictor, table = calibrate(head, features[4000:], excess[4000:], final_loss=1.0)
    # At its own budget each kind runs the loops it needs and no more: (1 + 3 + 6) / 3 on average.
    loops = predicted_loops(predictor, features[None, 4000:], None)[0]
    assert (np.asarray(loops) == needed[4000:]).mean() > 0.99
    assert table["budget"] == pytest.approx(needed[4000:].mean(), abs=0.05)


def test_means_stay_within_the_budget_which_is_traced(synthetic):
    features, excess, _, head = synthetic
    predictor, _ = calibrate(head, features[4000:], excess[4000:], final_loss=1.0)
    call = jax.jit(predicted_loops)
    means = [float(call(predictor, features[None, 4000:], budget).mean()) for budget in (1.0, 1.5, 2.0, 3.4, 5.0, 99.0)]
    assert call._cache_size() == 1
    assert all(mean <= budget for mean, budget in zip(means, (1.0, 1.5, 2.0, 3.4, 5.0, 99.0), strict=True))
    assert means == sorted(means)
    assert means[0] == 1
    assert means[-1] > 4


def test_loops_at_returns_the_cheapest_depth():
    random = np.random.default_rng(1)
    excess = random.uniform(0, 1, (50, LOOPS - 1)).astype(np.float32)
    for price in (0.0, 0.03, 0.2, 5.0):
        total = [[*row, 0.0] + price * np.arange(1, LOOPS + 1) for row in excess]
        np.testing.assert_array_equal(loops_at(jnp.asarray(excess), price), np.argmin(total, axis=1) + 1)


def test_a_predictor_of_another_step_is_ignored_and_a_damaged_one_is_refused(tmp_path):
    assert _load_predictor(tmp_path, 3) == {}
    folder = tmp_path / "predictor"
    folder.mkdir()
    (folder / "predictor.json").write_text(json.dumps({"step": 3}))
    (folder / "predictor.safetensors").write_bytes(save({"budget": np.float32([2])}))
    assert _load_predictor(tmp_path, 4) == {}
    assert _load_predictor(tmp_path, 3)["predictor"]["budget"] == 2
    save_predictor(tmp_path, {"budget": np.float32([2])}, {"step": 3})
    assert _load_predictor(tmp_path, 3)["predictor"]["budget"] == 2
    flipped = bytearray((folder / "predictor.safetensors").read_bytes())
    flipped[-1] ^= 1
    (folder / "predictor.safetensors").write_bytes(flipped)
    with pytest.raises(ConfigError, match=r"predictor: damaged \(the checksum of .* recreates it"):
        _load_predictor(tmp_path, 3)
    (folder / "predictor.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"predictor: damaged .*; `mythos train-predictor` recreates it"):
        _load_predictor(tmp_path, 3)
