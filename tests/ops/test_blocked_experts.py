"""The CPU's form of experts against one token and expert at a time, values and gradients, however they are routed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.ops.blocked_experts import STRIDE, block_rows, blocked_experts, make_plan

D, F, K = 6, 7, 2

CASES = {  # rows of a block; tokens; by row, the two experts that all tokens choose in turn (-1 and E are nobody's)
    "one_token": (1, 1, 4, [[(1, 3)], [(0, 1)]]),
    "blocks_of_1": (1, 3, 5, [[(1, 2), (1, 4), (0, 1)], [(-1, 5), (2, 0)], [(5, 5)]]),
    "blocks_of_16": (16, 40, 4, [[(0, 1)], [(3, 2)], [(1, 0), (1, 2), (1, 3)], [(-1, 2), (4, 2)]]),
    "blocks_of_64_in_turns": (64, 400, 3, [[(0, 1), (2, 1), (1, 2)], [(2, 0)], [(2, -1), (2, 3)], [(3, -1)]]),
}


@jax.jit
def value_and_gradients(x_ND, gates_NK, experts_NK, weights, cotangent_ND):
    out, backward = jax.vjp(lambda x, g, w: blocked_experts(x, g, experts_NK, w), x_ND, gates_NK, weights)
    return out, *backward(cotangent_ND)


def one_by_one(experts_NK, x_ND, gates_NK, weights):
    """The definition, every expert for every token."""
    shares_NE = sum(jax.nn.one_hot(experts_NK[:, k], len(weights[0])) * gates_NK[:, k, None] for k in range(K))
    gate, up, down = weights
    hidden = jax.nn.silu(jnp.einsum("ND,EDF->NEF", x_ND, gate)) * jnp.einsum("ND,EDF->NEF", x_ND, up)
    return jnp.einsum("NEF,EFD,NE->ND", hidden, down, shares_NE)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_by_one(case):
    rows, N, E, routings = CASES[case]
    assert block_rows(N * K, E) == rows
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    x, gates, weights, cotangent = (
        normal(N, D),
        normal(N, K),
        (normal(E, D, F), normal(E, D, F), normal(E, F, D)),
        normal(N, D),
    )
    for routing in routings:
        experts = np.resize(np.array(routing, np.int32), (N, K))
        expected, backward = jax.vjp(partial(one_by_one, experts), x, gates, weights)
        found = value_and_gradients(x, gates, experts, weights, cotangent)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((expected, backward(cotangent))), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("routing", ["even", "one_expert", "random", "elsewhere"])
def test_cost_stays_near_the_rows(routing):
    """Blocks that are multiplied, and the FLOPs of each, against every expert for every row."""
    N, E = 2048, 16
    choose = {
        "even": np.arange(N * K) % E,
        "one_expert": np.repeat([3, 5], N),
        "random": np.random.default_rng(0).integers(0, E, N * K),
        "elsewhere": np.arange(N * K) % (4 * E),  # of which a quarter are here
    }
    experts = choose[routing].reshape(N, K).astype(np.int32)
    here = (experts < E).sum()
    plan = jax.jit(make_plan, static_argnums=1)(experts, E)
    rows = plan.choice_MR.shape[1]
    turned = STRIDE * rows * -(-int(plan.used) // STRIDE)
    assert here <= turned <= here + (E + STRIDE) * rows
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in [(N, 32), (N, K), (E, 32, 32), (E, 32, 32), (E, 32, 32)]]
    program = jax.jit(lambda x, g, *w: blocked_experts(x, g, jnp.asarray(experts), w)).lower(*shapes).compile()
    # XLA counts the loop's body once: the three products of one turn, and the sums around them.
    assert program.cost_analysis()["flops"] < 1.5 * 3 * 2 * STRIDE * rows * 32 * 32 + 20 * N * K * 32
