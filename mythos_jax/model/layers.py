"""The small parts of every layer: linear maps, RMS norm, rotary positions, dense feed-forward."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.config import ModelConfig
from mythos_jax.model.gather import sharded_weight
from mythos_jax.ops.matmul import matmul
from mythos_jax.sharding import constrain, platform


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations on the devices of the mesh in use, or on the default ones if no mesh is."""
    return jnp.dtype(config.compute_dtype(platform()))


def matrix_init(std: float, *axes: str | None) -> Any:
    """Normal initialisation of a weight whose axes carry these logical names (see `sharding.py`)."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


class Linear(nn.Module):
    """y = x W, no bias, over the last `inputs` axes of x. W is float32, [*in, *features], cast to x's dtype."""

    features: tuple[int, ...]
    axes: tuple[str, ...]  # logical names of W's axes
    std: float
    inputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        kernel = sharded_weight(self, "kernel", shape, self.axes, self.std, x.dtype)
        return matmul(x, kernel, self.inputs)


# For elementwise work: computing it again in the backward pass is cheaper than storing its result.
# (No prevent_cse: inside a scan nothing undoes this, and elsewhere undoing it does no harm.)
recomputed = partial(jax.checkpoint, prevent_cse=False)


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, in float32."""
    x = x.astype(jnp.float32)  # a mean of squares loses too much in bfloat16
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain (arXiv 1910.07467); statistics in float32, result in x's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        return _scaled_norm(x, scale, self.eps)


@partial(recomputed, static_argnums=2)
def _scaled_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return (rms_norm(x, eps) * scale).astype(x.dtype)


def rope_tables(positions_BT: jax.Array, dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, dim / 2], of position / theta^(2 i / dim) (arXiv 2104.09864)."""
    # Float32 throughout: in bfloat16, positions beyond 256 would collide.
    frequencies = 1 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTHK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each adjacent pair of channels (2i, 2i + 1) by its angle; in float32, result in x's dtype."""
    cos, sin = (table[:, :, None, :] for table in tables)
    # Adjacent pairs, as in the original RoPE; files with the half-split layout are permuted when they are read.
    pairs = x_BTHK.astype(jnp.float32).reshape(*x_BTHK.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.reshape(x_BTHK.shape).astype(x_BTHK.dtype)


@recomputed
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return nn.silu(gate) * up


class FeedForward(nn.Module):
    """Dense feed-forward: SwiGLU, silu(x G) * (x U) then down (arXiv 2002.05202), or Parcae's 0.5 relu(x U)^2."""

    config: ModelConfig
    hidden_dim: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config

        def project(name: str) -> jax.Array:
            return Linear((self.hidden_dim,), ("embed", "mlp"), c.std, name=name)(x_BTD)

        up_BTF = project("up")
        if c.activation == "swiglu":
            gate_BTF = project("gate")
            hidden_BTF = swiglu(gate_BTF, up_BTF)
        else:  # relu2; the factor is part of the published model, not of its weights
            hidden_BTF = 0.5 * jnp.square(nn.relu(up_BTF))
        # The one place where a tensor group splits activations: `down` then sums over the group.
        hidden_BTF = constrain(hidden_BTF, "batch", "length", "act_mlp")
        return Linear((c.dim,), ("mlp", "embed"), c.output_std, name="down")(hidden_BTF)
