"""Mixture of experts: dropless routing, routed and shared experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.layers import FeedForward, matrix_init
from mythos_jax.ops.grouped_matmul import grouped_matmul


@struct.dataclass
class RouterStats:
    """Sums over tokens, float32: load_E [E], tokens sent to each expert; z [], squared log-partitions."""

    load_E: jax.Array
    z: jax.Array


class Router(nn.Module):
    """Chooses k experts a token by logit plus bias; gates are the unbiased softmax, renormalised over the chosen.

    The bias lives in the `balance` collection: no gradient, it is moved by the training step from the expert load
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; see `balanced`).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns float32 gates [N, k], int32 experts [N, k], and the logits' log-partition, float32 [N]."""
        c = self.config
        kernel = self.param("kernel", matrix_init(c.std, "embed", None), (c.dim, c.n_experts), jnp.float32)
        bias = self.variable("balance", "bias", jnp.zeros, (c.n_experts,), jnp.float32)
        logits_NE = x_ND.astype(jnp.float32) @ kernel
        _, experts_NK = jax.lax.top_k(logits_NE + bias.value, c.experts_per_token)
        gates_NK = jnp.take_along_axis(jax.nn.softmax(logits_NE), experts_NK, axis=-1)
        # The bias can choose experts whose probabilities all underflow.
        total_N1 = jnp.maximum(gates_NK.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return gates_NK / total_N1, experts_NK, jax.nn.logsumexp(logits_NE, axis=-1)


class MoE(nn.Module):
    """Sort by expert, one grouped matmul per weight, unsort; plus shared experts that every token passes."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        """Returns [B, T, D], and statistics over the tokens `counted_BT`."""
        c = self.config
        B, T, D = x_BTD.shape
        E, K, F = c.n_experts, c.experts_per_token, c.expert_dim
        x_ND = x_BTD.reshape(B * T, D)
        gates_NK, experts_NK, z_N = Router(c, name="router")(x_ND)
        counted_N = counted_BT.reshape(-1)
        stats = RouterStats(
            load_E=jnp.zeros(E).at[experts_NK].add(jnp.broadcast_to(counted_N[:, None], experts_NK.shape)),
            z=jnp.sum(z_N**2 * counted_N),
        )

        def weight(name, std, shape, *axes):
            return self.param(name, matrix_init(std, *axes), shape, jnp.float32).astype(x_BTD.dtype)

        gate_EDF = weight("gate", c.std, (E, D, F), "expert", "embed", "mlp")
        up_EDF = weight("up", c.std, (E, D, F), "expert", "embed", "mlp")
        down_EFD = weight("down", c.output_std, (E, F, D), "expert", "mlp", "embed")

        order = jnp.argsort(experts_NK.reshape(-1), stable=True)
        sizes_E = jnp.bincount(experts_NK.reshape(-1), length=E).astype(jnp.int32)
        rows = x_ND[order // K]
        hidden = nn.silu(grouped_matmul(rows, gate_EDF, sizes_E)) * grouped_matmul(rows, up_EDF, sizes_E)
        out = grouped_matmul(hidden, down_EFD, sizes_E)
        out_NKD = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(B * T, K, D)
        y_BTD = jnp.einsum("NKD,NK->ND", out_NKD, gates_NK.astype(out.dtype)).reshape(B, T, D)
        for i in range(c.n_shared_experts):
            y_BTD += FeedForward(c, c.shared_expert_dim or c.expert_dim, name=f"shared_{i}")(x_BTD)
        return y_BTD, stats


def balanced(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """The router bias moved by `rate` towards equal load: up for experts below the mean, down for those above.

    The result is centred: only differences between experts choose, so the common part would be drift.
    """
    bias_E = bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)
    return bias_E - bias_E.mean(-1, keepdims=True)
