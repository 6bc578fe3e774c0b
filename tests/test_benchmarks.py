"""What the speed benchmarks compute from times, and that what they compare is the same computation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.roofline import exponent, unrolled_features
from benchmarks.timing import by_turns, ratios, spread
from benchmarks.utilisation import DENSE_1B, toy
from mythos_jax.config import ModelConfig
from mythos_jax.flops import count_parameters
from mythos_jax.model.mythos import Mythos


def test_the_exponent_of_a_power_law_is_found_whatever_its_factor():
    sizes = [1, 2, 4, 8, 16]
    assert exponent(sizes, [3e-3 * n**1.25 for n in sizes]) == pytest.approx(1.25)
    # Noise that is even in the logarithm, and does not lean with the size, leaves it.
    assert exponent([1, 2, 4], [2.0, 1.0, 2.0]) == pytest.approx(0)


def test_sides_take_turns_and_their_first_calls_stand_apart():
    calls = []
    times, first = by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "ab" + "aabb" * 3
    assert {side: len(turns) for side, turns in times.items()} == {"a": 3, "b": 3}
    assert set(first) == {"a", "b"}


def test_ratios_are_turn_by_turn_and_cells_show_the_spread():
    assert ratios([2.0, 8.0], [1.0, 2.0]) == [2.0, 4.0]
    assert spread([0.003, 0.001, 0.0025], 1e3) == "2.5 (1.0 to 3.0)"


def test_the_loop_written_out_is_the_loop():
    config = ModelConfig(
        vocab_size=32, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=16, loop_layers=2, loops=3,
        injection="none",
    )  # fmt: skip
    model, tokens = Mythos(config), jnp.arange(12).reshape(2, 6)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    looped = jax.jit(lambda v: model.apply(v, tokens, method="features"))(variables)
    unrolled = jax.jit(lambda p: unrolled_features(config, p, tokens))(nn.unbox(variables)["params"])
    np.testing.assert_allclose(unrolled, looped, atol=1e-5)


def test_the_models_of_a_gpu_are_of_their_size_and_are_shrunk_in_kind():
    assert 0.9e9 < count_parameters(DENSE_1B) < 1.1e9
    small = toy(dataclasses.replace(DENSE_1B, dtype="bfloat16"))
    assert count_parameters(small) < 1e6
    assert (small.remat, small.dtype) == ("full", "bfloat16")
