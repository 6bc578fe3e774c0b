"""Experts sharded over a mesh against the same experts on one device, for even and for skewed routing."""

from functools import partial

import jax
import numpy as np
import pytest

from mythos_jax.config import MeshConfig
from mythos_jax.ops import expert_parallel
from mythos_jax.ops.expert_parallel import experts_on_mesh, sums_on_mesh
from mythos_jax.ops.experts import experts_on_one_device
from mythos_jax.sharding import make_mesh, use_mesh

B, T, D, F, E, K = 4, 8, 12, 16, 8, 2


def random_inputs(skew, shape=(B, T)):
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    scores = normal(*shape, E) + skew * np.arange(E)
    experts = np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)
    weights = normal(E, D, F) / 3, normal(E, D, F) / 3, normal(E, F, D) / 4
    return normal(*shape, D), np.abs(normal(*shape, K)), experts, weights, normal(*shape, D)


def value_and_gradients(layer):
    def run(x, gates, experts, weights, cotangent):
        y, vjp = jax.vjp(lambda x, gates, weights: layer(x, gates, experts, weights), x, gates, weights)
        return y, vjp(cotangent)

    return jax.jit(run)


def on_mesh_with(exchange):
    return lambda *arguments: experts_on_mesh(*arguments, exchange=exchange)[0]


@pytest.mark.parametrize(
    ("exchange", "mesh"),
    [("ring", MeshConfig(fsdp=2, tensor=2, expert=2)), ("all_to_all", MeshConfig(fsdp=1, tensor=2, expert=4))],
)
def test_equals_one_device(exchange, mesh, monkeypatch):
    """In two chunks. With skewed routing nearly all tokens go to one device's experts, which loops over their rows."""
    monkeypatch.setattr(expert_parallel, "MAX_CHUNK_BYTES", 8000)
    on_one_device = value_and_gradients(experts_on_one_device)
    on_mesh = value_and_gradients(on_mesh_with(exchange))
    for skew in [0, 5]:
        arguments = random_inputs(skew)
        expected = on_one_device(*arguments)
        with use_mesh(make_mesh(mesh)):
            actual = on_mesh(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), actual, expected)
    assert (arguments[2] >= E // 2).mean() > 0.95


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, tensor=2, expert=2), MeshConfig(data=2, fsdp=4)])
def test_gradients_of_a_loop_add_up_in_its_sums(mesh):
    """Each device's own, and over devices after the loop."""
    x, gates, experts, weights, cotangent = random_inputs(0, (8, 4))

    def loop(layer, start, x, gates, weights):
        def run(carry, _):
            x, sums = carry
            y, sums = layer(x, gates, experts, weights, sums=sums)
            return (x + y, sums), None

        return jax.lax.scan(run, (x, start(weights)), length=3)[0][0]

    def on_one_device(*arguments, sums):
        return experts_on_one_device(*arguments), sums

    def on_mesh(*inputs_and_weights, sums):
        *inputs, weights = inputs_and_weights
        return experts_on_mesh(*inputs, jax.lax.stop_gradient(weights), "act_embed", sums=sums)

    def run(layer, start):
        y, vjp = jax.vjp(partial(loop, layer, start), x, gates, weights)
        return y, vjp(cotangent)

    expected = jax.jit(
        partial(run, lambda *arguments, sums: (experts_on_one_device(*arguments), None), lambda _: None)
    )()
    with use_mesh(make_mesh(mesh)):
        actual = jax.jit(partial(run, on_mesh, sums_on_mesh))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), actual, expected)


@pytest.mark.parametrize(
    ("shape", "mesh"),
    [((1, 3), MeshConfig(fsdp=2, tensor=2, expert=2)), ((1, 1), MeshConfig(fsdp=1, expert=8))],
)
def test_batch_that_the_mesh_does_not_divide(shape, mesh):
    """Also one of a single token, which has fewer choices than there are devices."""
    arguments = random_inputs(0, shape)
    with use_mesh(make_mesh(mesh)):
        actual = jax.jit(experts_on_mesh)(*arguments[:4])[0]
    np.testing.assert_allclose(actual, jax.jit(experts_on_one_device)(*arguments[:4]), rtol=0, atol=1e-5)


def test_experts_of_other_devices_cost_nothing():
    """A round multiplies the rows that an even load sends to a device, plus bounded padding; all rows would be 8 times
    as many. The weights are never sent. (XLA counts the first round, and the body of the loop over others once.)
    """
    x, gates, experts, weights, _ = random_inputs(0, (64, 16))
    with use_mesh(make_mesh(MeshConfig(expert=8, fsdp=1))):
        program = jax.jit(experts_on_mesh).lower(x, gates, experts, weights).compile()
    ideal = 3 * 2 * (x.shape[0] * x.shape[1] * K / 8) * D * F
    assert 0.9 * 2 * ideal < program.cost_analysis()["flops"] < 1.6 * 2 * ideal
    gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    assert any(f"{64 * 16},{D}]" in line for line in gathered)
    assert not any(f"{D},{F}]" in line or f"{F},{D}]" in line for line in gathered)
