"""Routed experts on one device: each token's K chosen SwiGLU experts, weighted by their gates and summed.

`grouped_experts` is the form for accelerators. XLA's CPU backend has no grouped matrix product, so a CPU has forms of
its own: `blocked_experts`, and `dense_over_all_experts` for a handful of tokens. Over several devices:
`expert_parallel.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.ops.blocked_experts import blocked_experts
from mythos_jax.ops.grouped_matmul import ExpertWeights, grouped_matmul
from mythos_jax.sharding import platform

# Up to this many tokens, a matrix product on a CPU costs about as much as reading the matrix from memory.
MAX_DENSE_TOKENS = 16


def experts_on_one_device(
    x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, weights: ExpertWeights
) -> jax.Array:
    """Each token's chosen experts, weighted by its gates, [B, T, D].

    gates_BTK: float32. experts_BTK: int32, from 0 to E - 1. The form depends on the platform compiled for and on the
    number of tokens.
    """
    if platform() != "cpu":
        return grouped_experts(x_BTD, gates_BTK, experts_BTK, weights)
    n_tokens, n_experts = x_BTD.size // x_BTD.shape[-1], weights[0].shape[0]
    # With at least as many choices as experts, computing every expert wastes little and copies no weights.
    if n_tokens <= MAX_DENSE_TOKENS and experts_BTK.size >= n_experts:
        return dense_over_all_experts(x_BTD, gates_BTK, experts_BTK, weights)
    return blocked_experts(x_BTD, gates_BTK, experts_BTK, weights)


def grouped_experts(
    x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, weights: ExpertWeights
) -> jax.Array:
    """Sorts (token, choice) pairs by expert, runs one grouped matrix product per weight, and restores the order."""
    gate_EDF, up_EDF, down_EFD = weights
    D, K = x_BTD.shape[-1], experts_BTK.shape[-1]
    experts_N = experts_BTK.reshape(-1)
    order_N = jnp.argsort(experts_N, stable=True)
    sizes_E = jnp.bincount(experts_N, length=gate_EDF.shape[0]).astype(jnp.int32)
    x_ND = x_BTD.reshape(-1, D)[order_N // K]  # choice n belongs to token n // K
    hidden_NF = nn.silu(grouped_matmul(x_ND, gate_EDF, sizes_E)) * grouped_matmul(x_ND, up_EDF, sizes_E)
    out_ND = grouped_matmul(hidden_NF, down_EFD, sizes_E)
    out_ND = jnp.zeros_like(out_ND).at[order_N].set(out_ND, unique_indices=True)
    out_BTKD = out_ND.reshape(*experts_BTK.shape, D)
    return jnp.einsum("BTKD,BTK->BTD", out_BTKD, gates_BTK.astype(out_BTKD.dtype))


def dense_over_all_experts(
    x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, weights: ExpertWeights
) -> jax.Array:
    """Every expert for every token, as one wide feed-forward layer; the experts a token did not choose get gate 0."""
    gate_EDF, up_EDF, down_EFD = weights
    E, D, F = gate_EDF.shape

    def side_by_side(w_EDF: jax.Array) -> jax.Array:
        """[D, E F]. Loop-invariant, so XLA hoists it out of the loops over depth and tokens."""
        return jnp.moveaxis(w_EDF, 0, 1).reshape(D, E * F)

    gates_BTE = jnp.einsum("BTKE,BTK->BTE", jax.nn.one_hot(experts_BTK, E), gates_BTK).astype(x_BTD.dtype)
    hidden = nn.silu(x_BTD @ side_by_side(gate_EDF)) * (x_BTD @ side_by_side(up_EDF))
    hidden = hidden * jnp.repeat(gates_BTE, F, axis=-1)
    return hidden @ down_EFD.reshape(E * F, D)
