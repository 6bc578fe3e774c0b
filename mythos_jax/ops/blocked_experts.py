"""The experts of each token on a CPU: rows of one expert stand in blocks, and blocks are multiplied side by side.

A CPU has no kernel for groups of rows of unknown sizes (`lax.ragged_dot` costs every expert for every row there). Here
each expert's rows are cut into blocks of m, the last one padded. There are at most (N + E (m - 1)) / m blocks however
the rows are spread, so the cost stays near that of the rows. Rows move by gathers in both directions, and the backward
pass keeps what the activation needs and no copy of rows or weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate and up [E, D, F], down [E, F, D]


class Plan(NamedTuple):
    """Where each chosen expert's work is done.

    expert_M: int32, the expert of each of M blocks. choice_MR: int32, which of the N K choices stands in each row of a
    block. real_MR: false on padding. place_NK: int32, the row, of all M R, that works on each choice; M R for one that
    nobody here works on.
    """

    expert_M: jax.Array
    choice_MR: jax.Array
    real_MR: jax.Array
    place_NK: jax.Array


def blocked_experts(x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array, weights: Weights) -> jax.Array:
    """The sum over each token's chosen experts, SwiGLU times gate, [N, D]; a choice outside 0 … E - 1 adds nothing."""
    plan = make_plan(experts_NK, weights[0].shape[0])
    return _run(x_ND, gates_NK.astype(x_ND.dtype), plan, weights)


def make_plan(experts_NK: jax.Array, n_experts: int) -> Plan:
    """Sorts choices by expert and gives each expert as many blocks as its choices fill."""
    experts = experts_NK.reshape(-1)
    N, E = experts.size, n_experts
    experts = jnp.where((experts >= 0) & (experts < E), experts, E)
    m = block_rows(N, E)
    M = (N + E * (m - 1)) // m
    order = jnp.argsort(experts, stable=True)
    sizes_E = jnp.bincount(experts, length=E)  # those of E, nobody's, are left out
    first_row_E = jnp.cumsum(sizes_E) - sizes_E
    ends_E = jnp.cumsum(-(-sizes_E // m))
    first_block_E = ends_E - -(-sizes_E // m)

    expert_M = jnp.searchsorted(ends_E, jnp.arange(M), side="right").clip(max=E - 1).astype(jnp.int32)
    rank_MR = m * (jnp.arange(M) - first_block_E[expert_M])[:, None] + jnp.arange(m)
    choice_MR = order[jnp.clip(first_row_E[expert_M][:, None] + rank_MR, 0, N - 1)]
    sorted_experts = experts[order]
    first = jnp.append(m * first_block_E - first_row_E, 0)[sorted_experts]
    place = jnp.where(sorted_experts < E, first + jnp.arange(N), M * m).astype(jnp.int32)
    return Plan(
        expert_M=expert_M,
        choice_MR=choice_MR,
        real_MR=rank_MR < sizes_E[expert_M][:, None],
        place_NK=jnp.zeros(N, jnp.int32).at[order].set(place, unique_indices=True).reshape(experts_NK.shape),
    )


def block_rows(N: int, E: int) -> int:
    """Rows a block: a power of two near the mean number of rows per expert, at most 64."""
    return min(64, 1 << max(0, (N // E).bit_length() - 1))


@jax.custom_vjp
def _run(x_ND: jax.Array, gates_NK: jax.Array, plan: Plan, weights: Weights) -> jax.Array:
    return _forward(x_ND, gates_NK, plan, weights)[0]


def _forward(x_ND: jax.Array, gates_NK: jax.Array, plan: Plan, weights: Weights):
    gate, up, down = (w[plan.expert_M] for w in weights)
    x_MRD = x_ND[_tokens(gates_NK, plan)]
    pre_MRF, value_MRF = (jnp.einsum("MRD,MDF->MRF", x_MRD, w) for w in (gate, up))
    hidden_MRF = jax.nn.silu(pre_MRF) * value_MRF * _gates(gates_NK, plan)
    out_MRD = jnp.einsum("MRF,MFD->MRD", hidden_MRF, down)
    return _collected(out_MRD, plan), (x_ND, gates_NK, plan, weights, pre_MRF, value_MRF)


def _backward(kept, dy_ND: jax.Array):
    x_ND, gates_NK, plan, weights, pre_MRF, value_MRF = kept
    gate, up, down = (w[plan.expert_M] for w in weights)
    x_MRD, dy_MRD = (a[_tokens(gates_NK, plan)] for a in (x_ND, dy_ND))
    gates_MR1 = _gates(gates_NK, plan)
    opening_MRF = jax.nn.sigmoid(pre_MRF)
    silu_MRF = pre_MRF * opening_MRF
    hidden_MRF = silu_MRF * value_MRF

    by_hidden_MRF = jnp.einsum("MRD,MFD->MRF", dy_MRD, down)
    dgates = jnp.append(jnp.sum(hidden_MRF * by_hidden_MRF, axis=-1), 0)[plan.place_NK]
    by_hidden_MRF *= gates_MR1  # 0 on padding, which so adds to no weight
    dpre_MRF = by_hidden_MRF * value_MRF * (opening_MRF + silu_MRF * (1 - opening_MRF))
    dvalue_MRF = by_hidden_MRF * silu_MRF
    dx_MRD = jnp.einsum("MRF,MDF->MRD", dpre_MRF, gate) + jnp.einsum("MRF,MDF->MRD", dvalue_MRF, up)

    def by_weight(rows_MRA, drows_MRB, weight):
        parts_MAB = jnp.einsum("MRA,MRB->MAB", rows_MRA, drows_MRB, preferred_element_type=jnp.float32)
        return jax.ops.segment_sum(parts_MAB, plan.expert_M, len(weight), indices_are_sorted=True).astype(weight.dtype)

    dweights = (
        by_weight(x_MRD, dpre_MRF, weights[0]),
        by_weight(x_MRD, dvalue_MRF, weights[1]),
        by_weight(hidden_MRF * gates_MR1, dy_MRD, weights[2]),
    )
    return _collected(dx_MRD, plan), dgates, None, dweights


_run.defvjp(_forward, _backward)


def _tokens(gates_NK: jax.Array, plan: Plan) -> jax.Array:
    return plan.choice_MR // gates_NK.shape[1]


def _gates(gates_NK: jax.Array, plan: Plan) -> jax.Array:
    return jnp.where(plan.real_MR, gates_NK.reshape(-1)[plan.choice_MR], 0)[..., None]


def _collected(rows_MRD: jax.Array, plan: Plan) -> jax.Array:
    """Each token's sum over the rows that worked on its choices."""
    rows = rows_MRD.reshape(-1, rows_MRD.shape[-1])
    here_NK1 = (plan.place_NK < len(rows))[..., None]
    return sum(jnp.where(here_NK1[:, k], rows[plan.place_NK[:, k]], 0) for k in range(plan.place_NK.shape[1]))
