"""The experts of each token on a CPU: rows of one expert stand in blocks, and blocks are multiplied side by side.

A CPU has no kernel for groups of rows of unknown sizes (`lax.ragged_dot` costs every expert for every row there). Here
each expert's rows are cut into blocks of m, the last one padded. There are at most (N + E (m - 1)) / m blocks however
the rows are spread, and a loop over a few blocks at a time, which stay in the processor's cache, ends with the last one
that has rows. Rows move by gathers in both directions, and the backward pass keeps what the activation needs and no
copy of rows or weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mythos_jax.ops.grouped_matmul import ExpertWeights

# Blocks multiplied at a time.
STRIDE = 8


class Plan(NamedTuple):
    """Where each chosen expert's work is done.

    expert_M: int32, the expert of each of M blocks. choice_MR: int32, which of the N K choices stands in each row of a
    block. real_MR: false on padding. place_NK: int32, the row, of all M R, that works on each choice; M R for one that
    nobody here works on. used: int32, how many blocks have rows; they come first.
    """

    expert_M: jax.Array
    choice_MR: jax.Array
    real_MR: jax.Array
    place_NK: jax.Array
    used: jax.Array


def blocked_experts(x: jax.Array, gates: jax.Array, experts: jax.Array, weights: ExpertWeights) -> jax.Array:
    """The sum over each token's K chosen experts, SwiGLU times gate; a choice outside 0 … E - 1 adds nothing.

    x: [..., D]. gates, experts: [..., K]. Returns [..., D].
    """
    plan = make_plan(_flat(experts), weights[0].shape[0])
    return _run(x, gates.astype(x.dtype), plan, weights)


def make_plan(experts_NK: jax.Array, n_experts: int) -> Plan:
    """Sorts choices by expert and gives each expert as many blocks as its choices fill."""
    experts = experts_NK.reshape(-1)
    N, E = experts.size, n_experts
    experts = jnp.where((experts >= 0) & (experts < E), experts, E)
    m = block_rows(N, E)
    M = (N + E * (m - 1)) // m
    M += -M % min(M, STRIDE)
    order = jnp.argsort(experts, stable=True)
    sizes_E = jnp.bincount(experts, length=E)  # those of E, nobody's, are left out
    blocks_E = -(-sizes_E // m)
    first_row_E = jnp.cumsum(sizes_E) - sizes_E
    ends_E = jnp.cumsum(blocks_E)
    first_block_E = ends_E - blocks_E

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
        used=ends_E[-1],
    )


def block_rows(N: int, E: int) -> int:
    """Rows a block: a power of two near the mean number of rows per expert, at most 64."""
    return min(64, 1 << max(0, (N // E).bit_length() - 1))


class _Part:
    """Some of the blocks: reads them from an array over all blocks, puts them into one."""

    def __init__(self, start: jax.Array | int, count: int) -> None:
        self.start, self.count = start, count

    def __call__(self, a_M: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a_M, self.start, self.count)

    def put(self, a_M: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(a_M, new, self.start, 0)


def _each_part(plan: Plan, some: Callable[[_Part, Any], Any], sums: Any) -> Any:
    """some(part, sums) for STRIDE blocks after the other, until those without rows."""
    M = len(plan.expert_M)
    n = min(M, STRIDE)
    if n == M:
        return some(_Part(0, M), sums)
    return jax.lax.fori_loop(0, -(-plan.used // n), lambda i, sums: some(_Part(i * n, n), sums), sums)


@jax.custom_vjp
def _run(x: jax.Array, gates: jax.Array, plan: Plan, weights: ExpertWeights) -> jax.Array:
    return _forward(x, gates, plan, weights)[0]


def _forward(x: jax.Array, gates: jax.Array, plan: Plan, weights: ExpertWeights):
    x_ND, gates_NK = _flat(x), _flat(gates)
    (M, R), D, F = plan.choice_MR.shape, x_ND.shape[1], weights[0].shape[2]

    def some(at: _Part, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        gate, up, down = (w[at(plan.expert_M)] for w in weights)
        x_MRD = x_ND[at(plan.choice_MR) // gates_NK.shape[1]]
        pre_MRF, value_MRF = (jnp.einsum("MRD,MDF->MRF", x_MRD, w) for w in (gate, up))
        hidden_MRF = jax.nn.silu(pre_MRF) * value_MRF * _gates(gates_NK, plan, at)
        out_MRD = jnp.einsum("MRF,MFD->MRD", hidden_MRF, down)
        return tuple(at.put(a, new) for a, new in zip(sums, (out_MRD, pre_MRF, value_MRF), strict=True))

    rows = tuple(jax.lax.empty((M, R, width), x_ND.dtype) for width in (D, F, F))
    out_MRD, pre_MRF, value_MRF = _each_part(plan, some, rows)
    # x as it came: others keep it too, and flattened it would be a second copy.
    return _collected(out_MRD, plan).reshape(x.shape), (x, gates, plan, weights, pre_MRF, value_MRF)


def _backward(kept, dy: jax.Array):
    x, gates, plan, weights, pre_MRF, value_MRF = kept
    x_ND, gates_NK, dy_ND = _flat(x), _flat(gates), _flat(dy)

    def some(at: _Part, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        dx_MRD, dgates_MR, dweights = sums
        experts, tokens = at(plan.expert_M), at(plan.choice_MR) // gates_NK.shape[1]
        gate, up, down = (w[experts] for w in weights)
        x_MRD, dy_MRD, gates_MR1 = x_ND[tokens], dy_ND[tokens], _gates(gates_NK, plan, at)
        pre, value = at(pre_MRF), at(value_MRF)
        opening = jax.nn.sigmoid(pre)
        silu = pre * opening
        hidden = silu * value

        by_hidden = jnp.einsum("MRD,MFD->MRF", dy_MRD, down)
        dgates = jnp.sum(hidden * by_hidden, axis=-1)
        by_hidden *= gates_MR1  # 0 on padding, which so adds to no weight
        dpre, dvalue = by_hidden * value * (opening + silu * (1 - opening)), by_hidden * silu
        dx = jnp.einsum("MRF,MDF->MRD", dpre, gate) + jnp.einsum("MRF,MDF->MRD", dvalue, up)
        pairs = (x_MRD, dpre), (x_MRD, dvalue), (hidden * gates_MR1, dy_MRD)
        products = (jnp.einsum("MRA,MRB->MAB", a, b, preferred_element_type=jnp.float32) for a, b in pairs)
        dweights = [dw.at[experts].add(new) for dw, new in zip(dweights, products, strict=True)]
        return at.put(dx_MRD, dx), at.put(dgates_MR, dgates), dweights

    (M, R), D = plan.choice_MR.shape, x_ND.shape[1]
    rows = jax.lax.empty((M, R, D), x_ND.dtype), jax.lax.empty((M, R), x_ND.dtype)
    dx_MRD, dgates_MR, dweights = _each_part(plan, some, (*rows, [jnp.zeros(w.shape, jnp.float32) for w in weights]))
    dweights = [dw.astype(w.dtype) for dw, w in zip(dweights, weights, strict=True)]
    dgates_NK = _rows_of_choices(dgates_MR.reshape(-1), plan)
    return _collected(dx_MRD, plan).reshape(x.shape), dgates_NK.reshape(gates.shape), None, tuple(dweights)


_run.defvjp(_forward, _backward)


def _flat(a: jax.Array) -> jax.Array:
    return a.reshape(-1, a.shape[-1])


def _gates(gates_NK: jax.Array, plan: Plan, at: _Part) -> jax.Array:
    return jnp.where(at(plan.real_MR), gates_NK.reshape(-1)[at(plan.choice_MR)], 0)[..., None]


def _collected(rows_MRD: jax.Array, plan: Plan) -> jax.Array:
    """Each token's sum over the rows that worked on its choices."""
    rows = rows_MRD.reshape(-1, rows_MRD.shape[-1])
    return sum(_rows_of_choices(rows, plan, k) for k in range(plan.place_NK.shape[1]))


def _rows_of_choices(rows: jax.Array, plan: Plan, k: int | slice = slice(None)) -> jax.Array:
    """The row that worked on each (k-th) choice; 0 where none did."""
    place = plan.place_NK[:, k]
    here = (place < len(rows)).reshape(place.shape + (1,) * (rows.ndim - 1))
    return jnp.where(here, rows[place], 0)
