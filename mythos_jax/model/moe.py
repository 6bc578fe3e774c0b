"""Mixture of experts: dropless routing, routed and shared experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.cache import LayerCache
from mythos_jax.model.gather import GATHERED, LOW_RANK, sharded_weight, width_axis
from mythos_jax.model.layers import FeedForward, matrix_init
from mythos_jax.ops.expert_parallel import choose_experts, experts_on_mesh, sums_on_mesh
from mythos_jax.ops.expert_rows import Sums
from mythos_jax.ops.experts import experts_on_one_device
from mythos_jax.ops.matmul import matmul
from mythos_jax.ops.narrow import wide
from mythos_jax.sharding import in_use


class RouterStats(struct.PyTreeNode):
    """Sums over tokens, float32: load_E [E], tokens sent to each expert; z [], squared log-partitions."""

    load_E: jax.Array
    z: jax.Array


def no_stats(config: ModelConfig) -> RouterStats | None:
    """Sums before the first loop, stacked over the layers of the loop; None where they are dense."""
    if config.feed_forward != "moe":
        return None
    return RouterStats(jnp.zeros((config.loop_layers, config.n_experts)), jnp.zeros(config.loop_layers))


def add_stats(total: RouterStats | None, layers: Sequence[RouterStats | None]) -> RouterStats | None:
    """Sums over one more loop, given that loop's statistics of each layer."""
    if total is None:
        return None
    return jax.tree.map(lambda sums, *new: sums + jnp.stack(new), total, *layers)


class Router(nn.Module):
    """Chooses k experts per token by logit plus bias; gates are the unbiased softmax, renormalised over the chosen.

    The bias is in the `balance` collection. It has no gradient; the training step moves it towards equal expert load
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; see `balanced`).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns float32 gates [B, T, k], int32 experts [B, T, k], and the logits' log-partition [B, T]."""
        c = self.config
        kernel = self.param("kernel", matrix_init(c.std, "embed", None), (c.dim, c.n_experts), jnp.float32)
        bias = self.variable("balance", "bias", jnp.zeros, (c.n_experts,), jnp.float32)
        # Float32: a rounding error in bfloat16 would send tokens to other experts.
        logits = matmul(x_BTD.astype(jnp.float32), kernel)
        experts = choose_experts(logits + bias.value, c.experts_per_token)
        # The bias only chooses; it must not change what an expert contributes.
        gates = jnp.take_along_axis(jax.nn.softmax(logits), experts, axis=-1)
        # The bias can choose experts whose probabilities all underflow to 0.
        total = jnp.maximum(gates.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return gates / total, experts, jax.nn.logsumexp(logits, axis=-1)


class MoE(nn.Module):
    """Routed experts, k of them per token, plus shared experts for every token."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, counted_BT: jax.Array, sums: Sums = None
    ) -> tuple[jax.Array, RouterStats, Sums]:
        """Returns [B, T, D], statistics over the tokens `counted_BT` (the others are computed but not counted), and
        `sums` as they are (see `start_gradient_sums`)."""
        c = self.config
        D, E, F = c.dim, c.n_experts, c.expert_dim
        gates_BTK, experts_BTK, z_BT = Router(c, name="router")(x_BTD)
        stats = RouterStats(
            load_E=jnp.zeros(E).at[experts_BTK].add(jnp.broadcast_to(counted_BT[..., None], experts_BTK.shape)),
            z=jnp.sum(z_BT**2 * counted_BT),
        )
        # Three matrices per expert (SwiGLU). On a mesh they stay cut along D here: `experts_on_mesh` gathers them while
        # it exchanges tokens. It also adds up gradients, on one device too.
        on_mesh = in_use() or sums is not None
        gate, up, down = (
            sharded_weight(self, name, shape, axes, std, x_BTD.dtype, inputs=(1,), gather=not on_mesh)
            for name, std, shape, axes in [
                ("gate", c.std, (E, D, F), ("expert", "embed", "mlp")),
                ("up", c.std, (E, D, F), ("expert", "embed", "mlp")),
                ("down", c.output_std, (E, F, D), ("expert", "mlp", "embed")),
            ]
        )
        if on_mesh:
            width = width_axis(self, "gate")
            gate, up, down = (wide(w, x_BTD.dtype) for w in (gate, up, down))
            if sums is not None:  # there the gradients go
                gate, up, down = (jax.lax.stop_gradient(w) for w in (gate, up, down))
            weights = gate, up, down
            y_BTD, sums = experts_on_mesh(x_BTD, gates_BTK, experts_BTK, weights, width, c.expert_exchange, sums)
        else:
            y_BTD = experts_on_one_device(x_BTD, gates_BTK, experts_BTK, (gate, up, down))
        for i in range(c.n_shared_experts):
            y_BTD += FeedForward(c, c.shared_expert_dim or c.expert_dim, name=f"shared_{i}")(x_BTD)
        return y_BTD, stats, sums


def start_gradient_sums(
    config: ModelConfig, caches: tuple[LayerCache, ...], variables: Mapping[str, Any]
) -> tuple[LayerCache, ...]:
    """Caches of the loop's layers that carry, from loop to loop, where the gradients of experts are added up.

    Left to `scan`, each loop's gradients would be written, read again and added. variables: of the recurrent block.
    Only weights that are gathered once and trained have such sums.
    """
    if config.feed_forward != "moe" or GATHERED not in variables or LOW_RANK in variables:
        return caches
    layers = [variables["params"]["cell"][f"layer_{i}"]["moe"] for i in range(len(caches))]
    sums = [sums_on_mesh((moe["gate"], moe["up"], moe["down"])) for moe in layers]
    return tuple(cache.replace(expert_sums=each) for cache, each in zip(caches, sums, strict=True))


def balanced(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """The router bias moved by `rate` towards equal load: up for experts below the mean, down for those above.

    The result is centred: only differences between experts matter for the choice, so a common part would be drift.
    """
    # The sign alone: the step does not depend on the batch size, and one crowded expert cannot swing the bias.
    bias_E = bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)
    return bias_E - bias_E.mean(-1, keepdims=True)
