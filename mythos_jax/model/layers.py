"""The small parts of every layer: linear maps, RMS norm, rotary positions, dense feed-forward."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mythos_jax.config import ModelConfig
from mythos_jax.config.model import Products
from mythos_jax.model.gather import adaptable_weight
from mythos_jax.model.remat import GATE, UP
from mythos_jax.ops.products import linear
from mythos_jax.sharding import constrain, platform


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations on the devices of the mesh in use, or on the default ones if no mesh is."""
    return jnp.dtype(config.compute_dtype(platform()))


def matrix_init(std: float, *axes: str | None) -> Any:
    """Normal initialisation of a weight whose axes carry these logical names (see `sharding.py`)."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


class Linear(nn.Module):
    """y = x W, no bias, over the last `inputs` axes of x. W, [*in, *features], is float32 and cast to x's dtype, or
    stored in fewer bits (`Narrow`); it can have low-rank weights beside it (`LowRank`)."""

    features: tuple[int, ...]
    axes: tuple[str, ...]  # logical names of W's axes
    std: float
    inputs: int = 1
    products: Products = "dtype"  # what x and W are rounded to where they are multiplied

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        kernel = adaptable_weight(self, "kernel", shape, self.axes, self.std, x.dtype, self.inputs)
        return linear(x, kernel, self.inputs, self.products)


# For elementwise work: computing it again in the backward pass is cheaper than storing its result.
# (No prevent_cse: inside a scan nothing undoes this, and elsewhere undoing it does no harm.)
recomputed = partial(jax.checkpoint, prevent_cse=False)


def rms_norm(x: jax.Array, eps: float, axes: int = 1) -> jax.Array:
    """x / rms(x) over the last axes, in float32."""
    x = x.astype(jnp.float32)  # a mean of squares loses too much in bfloat16
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=range(-axes, 0), keepdims=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axes, with a gain of their shape (arXiv 1910.07467); statistics in float32,
    result in x's dtype."""

    eps: float
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",) * self.axes)
        scale = self.param("scale", init, x.shape[-self.axes :], jnp.float32)
        return _scaled_norm(x, scale, self.eps, self.axes)


@partial(recomputed, static_argnums=(2, 3))
def _scaled_norm(x: jax.Array, scale: jax.Array, eps: float, axes: int) -> jax.Array:
    return (rms_norm(x, eps, axes) * scale).astype(x.dtype)


def rope_tables(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of position times frequency, float32 [B, T, rope_dim]: each for both channels of its pair."""
    # Float32 throughout: in bfloat16, positions beyond 256 would collide.
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.repeat(rope_frequencies(config), 2)
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """Radians per position, float32 [rope_dim / 2]: 1 / theta^(2 i / rope_dim) (arXiv 2104.09864).

    llama3 (Llama 3.1, arXiv 2407.21783, section 3.4.1; formula from its published code): a frequency with at least
    `rope_high_freq_factor` periods in the original context is kept, one with at most `rope_low_freq_factor` is divided
    by `rope_scaling_factor`, and in between the two are mixed linearly in the number of periods. At every position.
    """
    c = config
    frequencies = 1 / c.rope_theta ** (jnp.arange(0, c.rope_dim, 2, dtype=jnp.float32) / c.rope_dim)
    if c.rope_scaling == "none":
        return frequencies
    periods = c.rope_original_max_seq_len * frequencies / (2 * jnp.pi)
    low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
    kept = jnp.clip((periods - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / c.rope_scaling_factor + kept * frequencies


@jax.custom_vjp
def apply_rope(x_BTHK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each adjacent pair of channels (2i, 2i + 1) by its angle; in float32, result in x's dtype."""
    # Adjacent pairs, as in the original RoPE; files with the half-split layout are permuted when they are read.
    cos, sin = (table[:, :, None, :] for table in tables)
    return (x_BTHK.astype(jnp.float32) * cos + _quarter_turn(x_BTHK) * sin).astype(x_BTHK.dtype)


def _rotate_back(tables: tuple[jax.Array, jax.Array], ct_BTHK: jax.Array) -> tuple[jax.Array, None]:
    cos, sin = tables
    return apply_rope(ct_BTHK, (cos, -sin)), None


# The transpose of a rotation is the rotation back; positions have no gradient.
apply_rope.defvjp(lambda x, tables: (apply_rope(x, tables), tables), _rotate_back)


def _quarter_turn(x_BTHK: jax.Array) -> jax.Array:
    """Each adjacent pair (a, b) as (-b, a), in float32."""
    K = x_BTHK.shape[-1]
    if platform() == "tpu":
        # Exchanging neighbours takes a TPU's vector unit several passes over memory, and the matrix unit none: the
        # product is fused with what follows. It is exact, as each of its sums has one term.
        turn_KK = jnp.kron(jnp.eye(K // 2), jnp.array([[0, 1], [-1, 0]])).astype(x_BTHK.dtype)
        exact = None if x_BTHK.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
        return jnp.einsum("BTHK,KL->BTHL", x_BTHK, turn_KK, precision=exact, preferred_element_type=jnp.float32)
    pairs = x_BTHK.astype(jnp.float32).reshape(*x_BTHK.shape[:-1], K // 2, 2)
    return jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x_BTHK.shape)


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
            return Linear((self.hidden_dim,), ("embed", "mlp"), c.std, products=c.products, name=name)(x_BTD)

        up_BTF = checkpoint_name(project("up"), UP)
        if c.activation == "swiglu":
            gate_BTF = checkpoint_name(project("gate"), GATE)
            hidden_BTF = swiglu(gate_BTF, up_BTF)
        else:  # relu2; the factor is part of the published model, not of its weights
            hidden_BTF = 0.5 * jnp.square(nn.relu(up_BTF))
        # The one place where a tensor group splits activations: `down` then sums over the group.
        hidden_BTF = constrain(hidden_BTF, "batch", "length", "act_mlp")
        return Linear((c.dim,), ("mlp", "embed"), c.output_std, products=c.products, name="down")(hidden_BTF)
