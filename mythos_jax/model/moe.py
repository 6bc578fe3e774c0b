"""Mixture of experts: dropless routing, routed and shared experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.layers import FeedForward, matrix_init, product, weight
from mythos_jax.ops.blocked_experts import Weights, blocked_experts
from mythos_jax.ops.expert_parallel import choose_experts, experts_on_mesh
from mythos_jax.ops.grouped_matmul import grouped_matmul
from mythos_jax.sharding import in_use, platform

FEW_TOKENS = 16  # up to so many, a product on a CPU costs about what reading its matrix does


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
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns float32 gates [B, T, k], int32 experts [B, T, k], and the logits' log-partition [B, T]."""
        c = self.config
        kernel = self.param("kernel", matrix_init(c.std, "embed", None), (c.dim, c.n_experts), jnp.float32)
        bias = self.variable("balance", "bias", jnp.zeros, (c.n_experts,), jnp.float32)
        logits = product(x_BTD.astype(jnp.float32), kernel)
        experts = choose_experts(logits + bias.value, c.experts_per_token)
        gates = jnp.take_along_axis(jax.nn.softmax(logits), experts, axis=-1)
        # The bias can choose experts whose probabilities all underflow.
        total = jnp.maximum(gates.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return gates / total, experts, jax.nn.logsumexp(logits, axis=-1)


class MoE(nn.Module):
    """Routed experts, each token's k of them; plus shared experts that every token passes."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        """Returns [B, T, D], and statistics over the tokens `counted_BT`."""
        c = self.config
        D, E, F = c.dim, c.n_experts, c.expert_dim
        gates_BTK, experts_BTK, z_BT = Router(c, name="router")(x_BTD)
        stats = RouterStats(
            load_E=jnp.zeros(E).at[experts_BTK].add(jnp.broadcast_to(counted_BT[..., None], experts_BTK.shape)),
            z=jnp.sum(z_BT**2 * counted_BT),
        )
        # On a mesh, weights that it cuts along D are gathered together with the tokens.
        weights = tuple(
            weight(self, name, shape, axes, std, x_BTD.dtype, whole=not in_use())
            for name, std, shape, axes in [
                ("gate", c.std, (E, D, F), ("expert", "embed", "mlp")),
                ("up", c.std, (E, D, F), ("expert", "embed", "mlp")),
                ("down", c.output_std, (E, F, D), ("expert", "mlp", "embed")),
            ]
        )
        if in_use():
            width = "act_embed" if self.has_variable("whole", "gate") else "embed"
            y_BTD = experts_on_mesh(x_BTD, gates_BTK, experts_BTK, weights, width, c.expert_exchange)
        else:
            y_BTD = sorted_experts(x_BTD, gates_BTK, experts_BTK, weights)
        for i in range(c.n_shared_experts):
            y_BTD += FeedForward(c, c.shared_expert_dim or c.expert_dim, name=f"shared_{i}")(x_BTD)
        return y_BTD, stats


def sorted_experts(x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, weights: Weights) -> jax.Array:
    """The chosen experts on one device: sort by expert, one grouped matmul per weight, unsort.

    On a CPU in blocks; for a few tokens that leave hardly an expert out, all of them, which copies no matrix.
    """
    if platform() != "cpu":
        return _sorted_experts(x_BTD, gates_BTK, experts_BTK, weights)
    tokens, n_experts = x_BTD.size // x_BTD.shape[-1], weights[0].shape[0]
    if tokens <= FEW_TOKENS and experts_BTK.size >= n_experts:
        return _every_expert(x_BTD, gates_BTK, experts_BTK, weights)
    return blocked_experts(x_BTD, gates_BTK, experts_BTK, weights)


def _every_expert(x_BTD, gates_BTK, experts_BTK, weights) -> jax.Array:
    """All experts as one wide layer, the hidden values of those that a token did not choose times 0."""
    gate_EDF, up_EDF, down_EFD = weights
    E, D, F = gate_EDF.shape

    def wide(w_EDF):  # XLA takes this out of the loops over depth and tokens
        return jnp.moveaxis(w_EDF, 0, 1).reshape(D, E * F)

    shares_BTE = jnp.einsum("BTKE,BTK->BTE", jax.nn.one_hot(experts_BTK, E), gates_BTK).astype(x_BTD.dtype)
    hidden = nn.silu(x_BTD @ wide(gate_EDF)) * (x_BTD @ wide(up_EDF)) * jnp.repeat(shares_BTE, F, axis=-1)
    return hidden @ down_EFD.reshape(E * F, D)


def _sorted_experts(x_BTD, gates_BTK, experts_BTK, weights) -> jax.Array:
    gate_EDF, up_EDF, down_EFD = weights
    D, K = x_BTD.shape[-1], experts_BTK.shape[-1]
    experts = experts_BTK.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    sizes_E = jnp.bincount(experts, length=gate_EDF.shape[0]).astype(jnp.int32)
    rows = x_BTD.reshape(-1, D)[order // K]
    hidden = nn.silu(grouped_matmul(rows, gate_EDF, sizes_E)) * grouped_matmul(rows, up_EDF, sizes_E)
    out = grouped_matmul(hidden, down_EFD, sizes_E)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(*experts_BTK.shape, D)
    return jnp.einsum("BTKD,BTK->BTD", out, gates_BTK.astype(out.dtype))


def balanced(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """The router bias moved by `rate` towards equal load: up for experts below the mean, down for those above.

    The result is centred: only differences between experts choose, so the common part would be drift.
    """
    bias_E = bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)
    return bias_E - bias_E.mean(-1, keepdims=True)
