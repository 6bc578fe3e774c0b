"""Routed experts on one device: each token's K chosen SwiGLU experts, weighted by their gates and summed.

`grouped_experts` is the form for accelerators. XLA's CPU backend has no grouped matrix product, so a CPU has forms of
its own: `blocked_experts`, and `dense_over_all_experts` for a handful of tokens. Over several devices:
`expert_parallel.py`.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.ops.blocked_experts import blocked_experts
from mythos_jax.ops.expert_rows import local_experts
from mythos_jax.ops.grouped_matmul import ExpertWeights
from mythos_jax.ops.narrow import Narrow, Stored, narrow_product, wide
from mythos_jax.sharding import platform

# Up to this many tokens, a matrix product on a CPU costs about as much as reading the matrix from memory.
MAX_DENSE_TOKENS = 16


def experts_on_one_device(
    x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, weights: Sequence[Stored]
) -> jax.Array:
    """Each token's chosen experts, weighted by its gates, [B, T, D].

    gates_BTK: float32. experts_BTK: int32, from 0 to E - 1. weights: gate and up [E, D, F], down [E, F, D]. The form
    depends on the platform compiled for, on the number of tokens, and on how the weights are stored.
    """
    few_tokens = x_BTD.size // x_BTD.shape[-1] <= MAX_DENSE_TOKENS
    narrow = [w for w in weights if isinstance(w, Narrow)]
    if narrow and platform() == "cpu" and few_tokens:
        return narrow_experts(x_BTD, gates_BTK, experts_BTK, narrow)
    gate, up, down = (wide(w, x_BTD.dtype) for w in weights)
    if platform() != "cpu":
        return grouped_experts(x_BTD, gates_BTK, experts_BTK, (gate, up, down))
    # With at least as many choices as experts, computing every expert wastes little and copies no weights.
    if few_tokens and experts_BTK.size >= gate.shape[0]:
        return dense_over_all_experts(x_BTD, gates_BTK, experts_BTK, (gate, up, down))
    return blocked_experts(x_BTD, gates_BTK, experts_BTK, (gate, up, down))


def narrow_experts(
    x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, weights: Sequence[Narrow]
) -> jax.Array:
    """For a handful of tokens: the weights of each choice, or all of them if there are as many choices as experts, are
    multiplied as they are stored."""
    E, K, D = weights[0].values.shape[0], experts_BTK.shape[-1], x_BTD.shape[-1]
    x_ND, gates_NK, experts_NK = x_BTD.reshape(-1, D), gates_BTK.reshape(-1, K), experts_BTK.reshape(-1, K)
    if experts_NK.size < E:
        weights = [jax.tree.map(lambda part: part[experts_NK.reshape(-1)], w) for w in weights]
        out_P1D = narrow_swiglu(jnp.repeat(x_ND, K, axis=0)[:, None], weights)
        out_ND = jnp.einsum("NKD,NK->ND", out_P1D.reshape(-1, K, D), gates_NK)
    else:
        gates_NE = jnp.einsum("NKE,NK->NE", jax.nn.one_hot(experts_NK, E), gates_NK)
        out_END = narrow_swiglu(jnp.broadcast_to(x_ND, (E, *x_ND.shape)), weights)
        out_ND = jnp.einsum("END,NE->ND", out_END, gates_NE)
    return out_ND.reshape(x_BTD.shape).astype(x_BTD.dtype)


def narrow_swiglu(x_GND: jax.Array, weights: Sequence[Narrow]) -> jax.Array:
    """A SwiGLU feed-forward for each group, float32 [G, N, D]."""
    gate_GDF, up_GDF, down_GFD = weights
    hidden_GNF = nn.silu(narrow_product(x_GND, gate_GDF, "GIO")) * narrow_product(x_GND, up_GDF, "GIO")
    return narrow_product(hidden_GNF, down_GFD, "GIO")


def grouped_experts(
    x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, weights: ExpertWeights
) -> jax.Array:
    """All choices in one round of grouped products (ops/expert_rows.py)."""
    D, K = x_BTD.shape[-1], experts_BTK.shape[-1]
    x_ND, gates_NK, experts_NK = x_BTD.reshape(-1, D), gates_BTK.reshape(-1, K), experts_BTK.reshape(-1, K)
    y_ND, _ = local_experts(experts_NK.size, x_ND, gates_NK, experts_NK, weights)
    return y_ND.reshape(x_BTD.shape)


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
