"""Blocked experts (the CPU's implementation) against every expert for every token, for many routings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.ops.blocked_experts import BLOCKS_PER_STEP, blocked_experts, make_plan, rows_per_block

D, F, K = 6, 7, 2

# Rows per block; tokens; experts; and routings, each a list of pairs of experts that the tokens choose in turn. Experts
# -1 and E do not exist here.
CASES = {
    "one_token": (1, 1, 4, [[(1, 3)], [(0, 1)]]),
    "blocks_of_1": (1, 3, 5, [[(1, 2), (1, 4), (0, 1)], [(-1, 5), (2, 0)], [(5, 5)]]),
    "blocks_of_16": (16, 40, 4, [[(0, 1)], [(3, 2)], [(1, 0), (1, 2), (1, 3)], [(-1, 2), (4, 2)]]),
    "blocks_of_64_in_several_steps": (64, 400, 3, [[(0, 1), (2, 1), (1, 2)], [(2, 0)], [(2, -1), (2, 3)], [(3, -1)]]),
}


@jax.jit
def value_and_gradients(x_ND, gates_NK, experts_NK, weights, cotangent_ND):
    out, vjp = jax.vjp(lambda x, g, w: blocked_experts(x, g, experts_NK, w), x_ND, gates_NK, weights)
    return out, *vjp(cotangent_ND)


def dense_experts(experts_NK, x_ND, gates_NK, weights):
    """The definition: every expert for every token, weighted by the gates."""
    gates_NE = sum(jax.nn.one_hot(experts_NK[:, k], len(weights[0])) * gates_NK[:, k, None] for k in range(K))
    gate, up, down = weights
    hidden = jax.nn.silu(jnp.einsum("ND,EDF->NEF", x_ND, gate)) * jnp.einsum("ND,EDF->NEF", x_ND, up)
    return jnp.einsum("NEF,EFD,NE->ND", hidden, down, gates_NE)


@pytest.mark.parametrize("case", CASES)
def test_equals_dense_experts(case):
    rows, N, E, routings = CASES[case]
    assert rows_per_block(N * K, E) == rows
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
        expected, vjp = jax.vjp(partial(dense_experts, experts), x, gates, weights)
        actual = value_and_gradients(x, gates, experts, weights, cotangent)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves((expected, vjp(cotangent))), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("routing", ["even", "one_expert", "random", "elsewhere"])
def test_cost_is_close_to_that_of_the_chosen_rows(routing):
    """The number of blocks multiplied, and the FLOPs of one step over them."""
    N, E = 2048, 16
    choices = {
        "even": np.arange(N * K) % E,
        "one_expert": np.repeat([3, 5], N),
        "random": np.random.default_rng(0).integers(0, E, N * K),
        "elsewhere": np.arange(N * K) % (4 * E),  # three quarters of them are on other devices
    }
    experts = choices[routing].reshape(N, K).astype(np.int32)
    n_real = (experts < E).sum()
    plan = jax.jit(make_plan, static_argnums=1)(experts, E)
    rows = plan.choice_MR.shape[1]
    n_multiplied = BLOCKS_PER_STEP * rows * -(-int(plan.n_used) // BLOCKS_PER_STEP)
    assert n_real <= n_multiplied <= n_real + (E + BLOCKS_PER_STEP) * rows
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in [(N, 32), (N, K), (E, 32, 32), (E, 32, 32), (E, 32, 32)]]
    program = jax.jit(lambda x, g, *w: blocked_experts(x, g, jnp.asarray(experts), w)).lower(*shapes).compile()
    # XLA counts the body of the loop once: the three products of one step, and the gathers and sums around the loop.
    assert program.cost_analysis()["flops"] < 1.5 * 3 * 2 * BLOCKS_PER_STEP * rows * 32 * 32 + 20 * N * K * 32
