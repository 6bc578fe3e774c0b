"""Routed experts on one device, by rows sorted by expert: however the load falls, no choice of a token is dropped.

A choice is a pair of a token and one of its experts. The choices of this device's experts are sorted by expert, and a
fixed number of them is multiplied in a round, as many as an even load brings and a little more; rounds go on until none
is left. The first round stands alone, so that an even load adds nothing to zeros.

Rows come from tokens by a gather. Rows that compute no choice hold arbitrary values, which never meet those of others:
products are by row or by expert, and sums over tokens leave them out.

Shape suffixes: N tokens, K choices per token, E experts, R rows of a round, D model width, F hidden width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.ops.blocked_experts import blocked_experts
from mythos_jax.ops.expectations import expect_trips
from mythos_jax.ops.grouped_matmul import ExpertWeights, grouped_matmul, grouped_matmul_transposed, grouped_outer
from mythos_jax.sharding import platform

# Float32 sums of the gradients of gate, up and down; None: the first gradients start them.
Sums = tuple[jax.Array, jax.Array, jax.Array] | None


class Rows(NamedTuple):
    """The rows of a round.

    choice_R: int32, the choice that each row computes, from 0 to N K - 1; N K behind the last. sizes_E: int32, how many
    rows each expert has.
    """

    choice_R: jax.Array
    sizes_E: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def local_experts(
    rows: int,
    x_ND: jax.Array,
    gates_NK: jax.Array,
    experts_NK: jax.Array,
    weights: ExpertWeights,
    sums: Sums = None,
) -> tuple[jax.Array, Sums]:
    """Sum over each token's experts among these, 0 … E - 1, weighted by gates; other experts contribute nothing.

    rows: how many are multiplied in a round. sums: returned as they are. Their cotangents are where the gradients of
    the weights are added up, in float32 and in place, over all calls that hand them on; see `gradient_sums`. Without
    them, the gradients go to the weights.
    """
    E, N = len(weights[0]), len(x_ND)

    def run(round_: Rows, y_ND: jax.Array | None) -> jax.Array:
        out_RD = _feed_forward(*_inputs(round_, x_ND, gates_NK), weights, round_.sizes_E)
        return _add(y_ND, _sum_over_choices(out_RD, round_, N, gates_NK.shape[1]))

    return _all_rounds(rows, experts_NK, E, run, None), sums


def _forward(rows: int, *arguments: Any) -> tuple[tuple[jax.Array, Sums], tuple[Any, ...]]:
    return local_experts(rows, *arguments), arguments[:4]


def _backward(rows: int, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, Sums]) -> tuple[Any, ...]:
    x_ND, gates_NK, experts_NK, weights = residuals
    dy_ND, sums = cotangents
    has_sums = sums is not None
    (N, K), E = gates_NK.shape, len(weights[0])

    def run(round_: Rows, totals: tuple[Any, ...]) -> tuple[Any, ...]:
        dx_ND, dgates, sums = totals
        x_RD, gates_R = _inputs(round_, x_ND, gates_NK)
        dy_RD = _rows_of_tokens(dy_ND, round_, K)
        dx_RD, dgates_R, sums = _feed_forward_gradients(x_RD, gates_R, weights, round_.sizes_E, dy_RD, sums)
        dgates = jnp.zeros(N * K, gates_NK.dtype) if dgates is None else dgates
        dgates = dgates.at[round_.choice_R].set(dgates_R, mode="drop")
        return _add(dx_ND, _sum_over_choices(dx_RD, round_, N, K)), dgates, sums

    dx_ND, dgates, sums = _all_rounds(rows, experts_NK, E, run, (None, None, sums))
    dweights = None
    if not has_sums:
        dweights, sums = tuple(dw.astype(w.dtype) for dw, w in zip(sums, weights, strict=True)), None
    return dx_ND, dgates.reshape(gates_NK.shape), None, dweights, sums


local_experts.defvjp(_forward, _backward)


@jax.custom_vjp
def gradient_sums(weights: ExpertWeights) -> ExpertWeights:
    """Arrays to hand to `local_experts`, whose cotangents become the gradients of these weights. Their values are
    never used."""
    return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)


gradient_sums.defvjp(
    lambda weights: (gradient_sums(weights), [jnp.zeros(0, w.dtype) for w in weights]),
    lambda likes, sums: (tuple(dw.astype(like.dtype) for dw, like in zip(sums, likes, strict=True)),),
)


def _all_rounds(rows: int, experts_NK: jax.Array, E: int, run: Callable[[Rows, Any], Any], start: Any) -> Any:
    """Sorts choices by expert and does `run(round, total) -> total` on `rows` of them at a time, until none is left."""
    experts = experts_NK.reshape(-1)
    experts = jnp.where((experts >= 0) & (experts < E), experts, E)
    order = jnp.pad(jnp.argsort(experts, stable=True), (0, rows))
    ends_E = jnp.cumsum(jnp.bincount(experts, length=E + 1)[:E])

    def round_(i: jax.Array | int) -> Rows:
        first = i * rows
        choice_R = jax.lax.dynamic_slice_in_dim(order, first, rows)
        choice_R = jnp.where(first + jnp.arange(rows) < ends_E[-1], choice_R, experts.size)
        sizes_E = jnp.diff(jnp.clip(ends_E - first, 0, rows), prepend=0)
        return Rows(choice_R.astype(jnp.int32), sizes_E.astype(jnp.int32))

    total = run(round_(0), start)
    if rows >= len(experts_NK) * min(experts_NK.shape[1], E):  # all that may come
        return total
    with expect_trips(0):
        return jax.lax.fori_loop(1, -(-ends_E[-1] // rows), lambda i, total: run(round_(i), total), total)


def _inputs(round_: Rows, x_ND: jax.Array, gates_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and the gate of each row."""
    gates_R = gates_NK.reshape(-1).at[round_.choice_R].get(mode="clip")
    return _rows_of_tokens(x_ND, round_, gates_NK.shape[1]), gates_R


def _rows_of_tokens(x_ND: jax.Array, round_: Rows, K: int) -> jax.Array:
    return x_ND.at[round_.choice_R // K].get(mode="clip")


def _sum_over_choices(rows_RD: jax.Array, round_: Rows, N: int, K: int) -> jax.Array:
    """For each token, the sum of the rows that computed its choices, [N, D]; added up in float32."""
    token_R = round_.choice_R // K  # N where a row computes none
    if platform() == "tpu":
        from mythos_jax.ops import megablox

        by_token_R = jnp.argsort(token_R)
        return megablox.sums_of_groups(rows_RD[by_token_R], token_R[by_token_R], N)
    sums_ND = jnp.zeros((N, rows_RD.shape[1]), jnp.float32)
    return sums_ND.at[token_R].add(rows_RD.astype(jnp.float32), mode="drop").astype(rows_RD.dtype)


def _add(total: jax.Array | None, new: jax.Array) -> jax.Array:
    return new if total is None else (total.astype(jnp.float32) + new).astype(new.dtype)


def _feed_forward(x_RD: jax.Array, gates_R: jax.Array, weights: ExpertWeights, sizes_E: jax.Array) -> jax.Array:
    """SwiGLU of each row by its expert, times its gate, [R, D]."""
    if platform() == "cpu":
        return _blocked(sizes_E, x_RD, gates_R, weights)
    gate, up, down = weights
    pre_RF, value_RF = grouped_matmul(x_RD, gate, sizes_E), grouped_matmul(x_RD, up, sizes_E)
    return grouped_matmul(_gated(pre_RF, value_RF, gates_R), down, sizes_E)


def _feed_forward_gradients(
    x_RD: jax.Array, gates_R: jax.Array, weights: ExpertWeights, sizes_E: jax.Array, dy_RD: jax.Array, sums: Sums
) -> tuple[jax.Array, jax.Array, Sums]:
    """The gradients of `_feed_forward` with regard to x and gates, and those of the weights added to `sums`."""
    if platform() == "cpu":
        _, vjp = jax.vjp(partial(_blocked, sizes_E), x_RD, gates_R, weights)
        dx_RD, dgates_R, dweights = vjp(dy_RD)
        dweights = jax.tree.map(lambda dw: dw.astype(jnp.float32), dweights)
        return dx_RD, dgates_R, dweights if sums is None else jax.tree.map(jnp.add, sums, dweights)
    gate, up, down = weights
    sum_gate, sum_up, sum_down = sums or (None, None, None)
    pre_RF, value_RF = grouped_matmul(x_RD, gate, sizes_E), grouped_matmul(x_RD, up, sizes_E)
    hidden_RF, vjp = jax.vjp(_gated, pre_RF, value_RF, gates_R)
    dpre_RF, dvalue_RF, dgates_R = vjp(grouped_matmul_transposed(dy_RD, down, sizes_E))
    dx_RD = grouped_matmul_transposed(dpre_RF, gate, sizes_E) + grouped_matmul_transposed(dvalue_RF, up, sizes_E)
    sums = (
        grouped_outer(x_RD, dpre_RF, sizes_E, sum_gate),
        grouped_outer(x_RD, dvalue_RF, sizes_E, sum_up),
        grouped_outer(hidden_RF, dy_RD, sizes_E, sum_down),
    )
    return dx_RD, dgates_R, sums


def _gated(pre_RF: jax.Array, value_RF: jax.Array, gates_R: jax.Array) -> jax.Array:
    return nn.silu(pre_RF) * value_RF * gates_R[:, None].astype(pre_RF.dtype)


def _blocked(sizes_E: jax.Array, x_RD: jax.Array, gates_R: jax.Array, weights: ExpertWeights) -> jax.Array:
    """`_feed_forward` for a CPU: each row chooses one expert."""
    experts_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x_RD)), side="right")
    return blocked_experts(x_RD, gates_R[:, None], experts_R[:, None], weights)
