"""The implementations of routed experts on one device against each other: values and gradients."""

from functools import partial

import jax
import numpy as np
import pytest

from mythos_jax.ops import experts
from mythos_jax.ops.blocked_experts import blocked_experts
from mythos_jax.ops.experts import dense_over_all_experts, experts_on_one_device, grouped_experts

B, T, D, F, E, K = 2, 5, 6, 7, 4, 2


def random_inputs():
    """Tokens, gates, distinct experts of each token, weights and a cotangent."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    chosen = np.argsort(normal(B, T, E), axis=-1)[..., :K].astype(np.int32)
    weights = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    return normal(B, T, D), np.abs(normal(B, T, K)), chosen, weights, normal(B, T, D)


@pytest.mark.parametrize("implementation", [grouped_experts, blocked_experts])
def test_equals_dense_over_all_experts(implementation):
    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(implementation, x, gates, chosen, weights, cotangent):
        out, vjp = jax.vjp(lambda x, gates, weights: implementation(x, gates, chosen, weights), x, gates, weights)
        return out, vjp(cotangent)

    actual, expected = (value_and_gradients(x, *random_inputs()) for x in (implementation, dense_over_all_experts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), actual, expected)


@pytest.mark.parametrize(
    ("platform", "max_dense_tokens", "expected"),
    [
        ("tpu", 16, "grouped_experts"),
        ("gpu", 16, "grouped_experts"),
        ("cpu", B * T, "dense_over_all_experts"),
        ("cpu", B * T - 1, "blocked_experts"),
    ],
)
def test_implementation_by_platform_and_number_of_tokens(platform, max_dense_tokens, expected, monkeypatch):
    x, gates, chosen, weights, _ = random_inputs()
    called = []
    for name in ("grouped_experts", "dense_over_all_experts", "blocked_experts"):
        monkeypatch.setattr(experts, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(experts, "platform", lambda: platform)
    monkeypatch.setattr(experts, "MAX_DENSE_TOKENS", max_dense_tokens)
    experts_on_one_device(x, gates, chosen, weights)
    assert called == [expected]
