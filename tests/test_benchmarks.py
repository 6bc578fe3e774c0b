"""The speed benchmarks: what they compute from times, and that they compare equal computations."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import retrofit_study
from benchmarks.roofline import exponent, unrolled_features
from benchmarks.timing import median_and_range, ratios, time_in_turns
from benchmarks.utilisation import DENSE_1B, toy
from mythos_jax.config import ModelConfig
from mythos_jax.flops import count_parameters
from mythos_jax.model.mythos import Mythos


def test_the_exponent_of_a_power_law_does_not_depend_on_its_factor():
    sizes = [1, 2, 4, 8, 16]
    assert exponent(sizes, [3e-3 * n**1.25 for n in sizes]) == pytest.approx(1.25)
    # Noise in the logarithm that is not correlated with the size has no influence.
    assert exponent([1, 2, 4], [2.0, 1.0, 2.0]) == pytest.approx(0)


def test_sides_take_turns_and_first_calls_are_separate():
    calls = []
    times, first = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "ab" + "aabb" * 3
    assert {side: len(turns) for side, turns in times.items()} == {"a": 3, "b": 3}
    assert set(first) == {"a", "b"}


def test_ratios_are_within_each_repeat_and_cells_show_the_range():
    assert ratios([2.0, 8.0], [1.0, 2.0]) == [2.0, 4.0]
    assert median_and_range([0.003, 0.001, 0.0025], 1e3) == "2.5 (1.0 to 3.0)"


def test_the_unrolled_loop_equals_the_loop():
    config = ModelConfig(
        vocab_size=32, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=16, loop_layers=2, loops=3,
        injection="none",
    )  # fmt: skip
    model, tokens = Mythos(config), jnp.arange(12).reshape(2, 6)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    looped = jax.jit(lambda v: model.apply(v, tokens, method="features"))(variables)
    unrolled = jax.jit(lambda p: unrolled_features(config, p, tokens))(nn.unbox(variables)["params"])
    np.testing.assert_allclose(unrolled, looped, atol=1e-5)


def test_the_gpu_models_have_1_b_parameters_and_toys_keep_their_kind():
    assert 0.9e9 < count_parameters(DENSE_1B) < 1.1e9
    small = toy(dataclasses.replace(DENSE_1B, dtype="bfloat16"))
    assert count_parameters(small) < 1e6
    assert (small.remat, small.dtype) == ("full", "bfloat16")


def test_the_retrofit_study_shows_each_arm_at_each_depth(tmp_path):
    def result(seed, loops, value):
        rows = [
            {"difficulty": d, "loops": n, "value": value + 0.01 * d, "n": 100}
            for d in retrofit_study.DIFFICULTIES
            for n in loops
        ]
        return {"seed": seed, "steps": 7, "training_flops": 3.2e12, "accuracy": rows}

    depths = retrofit_study.DEPTHS
    runs = {
        "dense": [result(0, (1,), 0.25), result(1, (1,), 0.35)],
        "4 loops": [result(0, depths, 0.8), result(1, depths, 0.8)],
    }
    lines = retrofit_study.table(runs).splitlines()
    assert len(lines) == 2 + 1 + len(depths)
    assert lines[2].startswith("| dense | 7 | 3.2e+12 | 1 | 31 (26 to 36) | 32 (27 to 37) |")
    assert lines[-1].startswith("| 4 loops | 7 | 3.2e+12 | 8 | 81 (81 to 81) |")
    retrofit_study.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
