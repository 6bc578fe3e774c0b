"""Routed experts on a CPU: each expert's rows are packed into blocks, and several blocks are multiplied at a time.

A CPU has no kernel for groups of rows whose sizes are known only at run time (`lax.ragged_dot` computes every expert
for every row there). Here each expert's rows are split into blocks of R rows, the last one padded, so there are at most
(N + E (R - 1)) / R blocks, however the N rows are distributed over E experts. A loop processes a few blocks at a time,
few enough to stay in the processor's cache, and ends after the last block that has rows. Rows move by gathers only, in
both directions, and the residuals of the backward pass contain the hidden activations but no copies of rows or weights.

Shape suffixes: N tokens, K choices per token, E experts, M blocks, R rows per block, D model width, F hidden width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mythos_jax.ops.grouped_matmul import ExpertWeights

# Blocks multiplied at a time.
BLOCKS_PER_STEP = 8


class Plan(NamedTuple):
    """Which row of which block computes each choice, of the N K choices of an expert by a token.

    expert_M: int32, the expert of each block. choice_MR: int32, the choice that each row of a block computes.
    is_real_MR: false for padding. row_NK: int32, the row, of all M R, that computes each choice; M R if the chosen
    expert is not among these E. n_used: int32, the number of blocks that have rows; they come first.
    """

    expert_M: jax.Array
    choice_MR: jax.Array
    is_real_MR: jax.Array
    row_NK: jax.Array
    n_used: jax.Array


def blocked_experts(x: jax.Array, gates: jax.Array, experts: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Sum over each token's K chosen experts of gate times SwiGLU; a choice outside 0 … E - 1 contributes nothing.

    x: [..., D]. gates, experts: [..., K]. Returns [..., D].
    """
    plan = make_plan(_flatten(experts), weights[0].shape[0])
    return _run_plan(x, gates.astype(x.dtype), plan, weights)


def make_plan(experts_NK: jax.Array, n_experts: int) -> Plan:
    """Sorts the choices by expert and gives each expert as many blocks as its choices fill."""
    experts = experts_NK.reshape(-1)
    n_choices, E = experts.size, n_experts
    experts = jnp.where((experts >= 0) & (experts < E), experts, E)
    R = rows_per_block(n_choices, E)
    M = (n_choices + E * (R - 1)) // R
    M += -M % min(M, BLOCKS_PER_STEP)
    order = jnp.argsort(experts, stable=True)
    sizes_E = jnp.bincount(experts, length=E)  # this leaves out expert E: choices of experts that are not here
    blocks_E = -(-sizes_E // R)
    first_choice_E = jnp.cumsum(sizes_E) - sizes_E
    block_ends_E = jnp.cumsum(blocks_E)
    first_block_E = block_ends_E - blocks_E

    expert_M = jnp.searchsorted(block_ends_E, jnp.arange(M), side="right").clip(max=E - 1).astype(jnp.int32)
    # The rank of a row among all rows of its expert.
    rank_MR = R * (jnp.arange(M) - first_block_E[expert_M])[:, None] + jnp.arange(R)
    choice_MR = order[jnp.clip(first_choice_E[expert_M][:, None] + rank_MR, 0, n_choices - 1)]
    sorted_experts = experts[order]
    shift = jnp.append(R * first_block_E - first_choice_E, 0)[sorted_experts]
    sorted_rows = jnp.where(sorted_experts < E, shift + jnp.arange(n_choices), M * R).astype(jnp.int32)
    rows = jnp.zeros(n_choices, jnp.int32).at[order].set(sorted_rows, unique_indices=True)
    return Plan(
        expert_M=expert_M,
        choice_MR=choice_MR,
        is_real_MR=rank_MR < sizes_E[expert_M][:, None],
        row_NK=rows.reshape(experts_NK.shape),
        n_used=block_ends_E[-1],
    )


def rows_per_block(n_choices: int, E: int) -> int:
    """A power of two near the mean number of rows per expert, at most 64."""
    return min(64, 1 << max(0, (n_choices // E).bit_length() - 1))


class _BlockRange:
    """A range of consecutive blocks: reads it from an array over all blocks, or writes it into one."""

    def __init__(self, start: jax.Array | int, count: int) -> None:
        self.start, self.count = start, count

    def read(self, a_M: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a_M, self.start, self.count)

    def write(self, a_M: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(a_M, new, self.start, 0)


def _loop_over_blocks(plan: Plan, step: Callable[[_BlockRange, Any], Any], state: Any) -> Any:
    """state = step(blocks, state) for BLOCKS_PER_STEP blocks at a time, until the remaining ones have no rows."""
    M = len(plan.expert_M)
    count = min(M, BLOCKS_PER_STEP)
    if count == M:
        return step(_BlockRange(0, M), state)
    n_steps = -(-plan.n_used // count)
    return jax.lax.fori_loop(0, n_steps, lambda i, state: step(_BlockRange(i * count, count), state), state)


_Residuals = tuple[jax.Array, jax.Array, Plan, ExpertWeights, jax.Array, jax.Array]


@jax.custom_vjp
def _run_plan(x: jax.Array, gates: jax.Array, plan: Plan, weights: ExpertWeights) -> jax.Array:
    return _forward(x, gates, plan, weights)[0]


def _forward(x: jax.Array, gates: jax.Array, plan: Plan, weights: ExpertWeights) -> tuple[jax.Array, _Residuals]:
    x_ND, gates_NK = _flatten(x), _flatten(gates)
    (M, R), D, F = plan.choice_MR.shape, x_ND.shape[1], weights[0].shape[2]

    def step(blocks: _BlockRange, buffers: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        gate_MDF, up_MDF, down_MFD = (w[blocks.read(plan.expert_M)] for w in weights)
        x_MRD = x_ND[blocks.read(plan.choice_MR) // gates_NK.shape[1]]
        pre_MRF, value_MRF = (jnp.einsum("MRD,MDF->MRF", x_MRD, w) for w in (gate_MDF, up_MDF))
        hidden_MRF = jax.nn.silu(pre_MRF) * value_MRF * _gates_of_rows(gates_NK, plan, blocks)
        out_MRD = jnp.einsum("MRF,MFD->MRD", hidden_MRF, down_MFD)
        return tuple(blocks.write(a, new) for a, new in zip(buffers, (out_MRD, pre_MRF, value_MRF), strict=True))

    buffers = tuple(jax.lax.empty((M, R, width), x_ND.dtype) for width in (D, F, F))
    out_MRD, pre_MRF, value_MRF = _loop_over_blocks(plan, step, buffers)
    # The residual is x in its original shape: other operations keep it too, and flattened it would be a second copy.
    return _sum_over_choices(out_MRD, plan).reshape(x.shape), (x, gates, plan, weights, pre_MRF, value_MRF)


def _backward(residuals: _Residuals, dy: jax.Array) -> tuple[jax.Array, jax.Array, None, tuple[jax.Array, ...]]:
    x, gates, plan, weights, pre_MRF, value_MRF = residuals
    x_ND, gates_NK, dy_ND = _flatten(x), _flatten(gates), _flatten(dy)

    def step(blocks: _BlockRange, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        dx_MRD, dgates_MR, dweights = sums
        experts, tokens = blocks.read(plan.expert_M), blocks.read(plan.choice_MR) // gates_NK.shape[1]
        gate_MDF, up_MDF, down_MFD = (w[experts] for w in weights)
        x_MRD, dy_MRD, gates_MR1 = x_ND[tokens], dy_ND[tokens], _gates_of_rows(gates_NK, plan, blocks)
        pre, value = blocks.read(pre_MRF), blocks.read(value_MRF)
        sigmoid = jax.nn.sigmoid(pre)
        silu = pre * sigmoid
        hidden = silu * value

        dhidden = jnp.einsum("MRD,MFD->MRF", dy_MRD, down_MFD)
        dgates = jnp.sum(hidden * dhidden, axis=-1)
        dhidden *= gates_MR1  # 0 for padding, which therefore adds nothing to any weight's gradient
        dpre, dvalue = dhidden * value * (sigmoid + silu * (1 - sigmoid)), dhidden * silu
        dx = jnp.einsum("MRF,MDF->MRD", dpre, gate_MDF) + jnp.einsum("MRF,MDF->MRD", dvalue, up_MDF)
        factors = (x_MRD, dpre), (x_MRD, dvalue), (hidden * gates_MR1, dy_MRD)
        products = (jnp.einsum("MRA,MRB->MAB", a, b, preferred_element_type=jnp.float32) for a, b in factors)
        dweights = [dw.at[experts].add(new) for dw, new in zip(dweights, products, strict=True)]
        return blocks.write(dx_MRD, dx), blocks.write(dgates_MR, dgates), dweights

    (M, R), D = plan.choice_MR.shape, x_ND.shape[1]
    buffers = jax.lax.empty((M, R, D), x_ND.dtype), jax.lax.empty((M, R), x_ND.dtype)
    sums = *buffers, [jnp.zeros(w.shape, jnp.float32) for w in weights]
    dx_MRD, dgates_MR, dweights = _loop_over_blocks(plan, step, sums)
    dgates_NK = _rows_of_choices(dgates_MR.reshape(-1), plan.row_NK)
    return (
        _sum_over_choices(dx_MRD, plan).reshape(x.shape),
        dgates_NK.reshape(gates.shape),
        None,
        tuple(dw.astype(w.dtype) for dw, w in zip(dweights, weights, strict=True)),
    )


_run_plan.defvjp(_forward, _backward)


def _flatten(a: jax.Array) -> jax.Array:
    """[..., X] as [N, X]."""
    return a.reshape(-1, a.shape[-1])


def _gates_of_rows(gates_NK: jax.Array, plan: Plan, blocks: _BlockRange) -> jax.Array:
    """The gates of the rows of these blocks, [M, R, 1]; 0 for padding."""
    gates_MR = gates_NK.reshape(-1)[blocks.read(plan.choice_MR)]
    return jnp.where(blocks.read(plan.is_real_MR), gates_MR, 0)[..., None]


def _sum_over_choices(rows_MRD: jax.Array, plan: Plan) -> jax.Array:
    """For each token, the sum of the rows that computed its choices, [N, D]."""
    rows = rows_MRD.reshape(-1, rows_MRD.shape[-1])
    total = _rows_of_choices(rows, plan.row_NK[:, 0])
    for k in range(1, plan.row_NK.shape[1]):
        total += _rows_of_choices(rows, plan.row_NK[:, k])
    return total


def _rows_of_choices(rows: jax.Array, row: jax.Array) -> jax.Array:
    """rows[row], and 0 for choices that no row computed."""
    is_here = (row < len(rows)).reshape(row.shape + (1,) * (rows.ndim - 1))
    return jnp.where(is_here, rows[row], 0)
