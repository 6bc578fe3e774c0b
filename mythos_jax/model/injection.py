"""How the prelude's output e enters the loop.

Every injection wraps the loop's layers with two functions: `enter` makes their input from the state and e; `leave`
makes the next state from the old one, e, and the output of the layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.config import ModelConfig
from mythos_jax.config.model import INJECTION_NAMES
from mythos_jax.errors import ConfigError
from mythos_jax.model.layers import Linear, RMSNorm

# The smallest normal float32 and the largest below 1. A decay stays strictly inside (0, 1) however far its parameters
# are driven; rounded to 1, the loop would no longer be stable.
MIN_DECAY, MAX_DECAY = 2.0**-126, 1 - 2.0**-24


class OpenMythosInjection(nn.Module):
    """Layers see norm(h + e); the next state is A h + B e + layers(…), A and B diagonal (OpenMythos 0.5.0).

    A = exp(-exp(log_dt + log_A)) in (0, 1): a stable linear time-invariant system, computed in float32.
    """

    config: ModelConfig

    def setup(self):
        dim = self.config.dim
        self.norm = RMSNorm(self.config.norm_eps)
        self.log_a = self.param("log_a", _diagonal(nn.initializers.zeros), (dim,), jnp.float32)
        self.log_dt = self.param("log_dt", nn.initializers.zeros, (1,), jnp.float32)
        self.b = self.param("b", _diagonal(nn.initializers.constant(0.1)), (dim,), jnp.float32)

    def decay(self) -> jax.Array:
        """Float32 [D], strictly inside (0, 1)."""
        # The clip keeps exp finite; beyond it the decay has long been at its bound.
        return _decay(jnp.exp(jnp.clip(self.log_dt + self.log_a, -20, 20)))

    def enter(self, h_BTD: jax.Array, e_BTD: jax.Array) -> jax.Array:
        return self.norm(h_BTD + e_BTD)

    def leave(self, h_BTD: jax.Array, e_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        # The float32 diagonals promote the sum: in bfloat16 a decay near 1 would round to 1.
        return (self.decay() * h_BTD + self.b * e_BTD + y_BTD).astype(h_BTD.dtype)


class ParcaeInjection(nn.Module):
    """Layers see A h + dt B e, A = exp(-dt exp(log_a)) diagonal, B a full matrix; their output is the next state.

    Parcae, arXiv 2604.12946: zero-order hold for A, Euler for B; dt = softplus(dt_bias). At the start A = sqrt(1/5)
    and B = I.
    """

    config: ModelConfig

    def setup(self):
        dim = self.config.dim
        # Such that exp(-dt) = sqrt(1/5), through the inverse of softplus.
        dt = 0.5 * jnp.log(5.0)
        dt_bias = jnp.log(jnp.expm1(dt))
        self.log_a = self.param("log_a", _diagonal(nn.initializers.zeros), (dim,), jnp.float32)
        self.dt_bias = self.param("dt_bias", _diagonal(nn.initializers.constant(dt_bias)), (dim,), jnp.float32)
        init = nn.with_logical_partitioning(lambda _, shape, dtype: jnp.eye(*shape, dtype=dtype), ("embed", "mlp"))
        self.b = self.param("b", init, (dim, dim), jnp.float32)

    def decay(self) -> jax.Array:
        """Float32 [D], strictly inside (0, 1)."""
        return _decay(nn.softplus(self.dt_bias) * jnp.exp(jnp.clip(self.log_a, -20, 20)))

    def enter(self, h_BTD: jax.Array, e_BTD: jax.Array) -> jax.Array:
        injected_BTD = e_BTD @ self.b.astype(e_BTD.dtype)
        return (self.decay() * h_BTD + nn.softplus(self.dt_bias) * injected_BTD).astype(h_BTD.dtype)

    def leave(self, h_BTD: jax.Array, e_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return y_BTD


class ConcatInjection(nn.Module):
    """Layers see a linear map of [h; e]; their output is the next state (Huginn, arXiv 2502.05171, section 3.2)."""

    config: ModelConfig

    def setup(self):
        self.adapter = Linear((self.config.dim,), ("embed", "mlp"), self.config.std)

    def enter(self, h_BTD: jax.Array, e_BTD: jax.Array) -> jax.Array:
        # The state first: converted files rely on this order.
        return self.adapter(jnp.concatenate([h_BTD, e_BTD], axis=-1))

    def leave(self, h_BTD: jax.Array, e_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return y_BTD


class NoInjection(nn.Module):
    """Layers see the state alone: a plain transformer when the loop runs once."""

    config: ModelConfig

    def enter(self, h_BTD: jax.Array, e_BTD: jax.Array) -> jax.Array:
        return h_BTD

    def leave(self, h_BTD: jax.Array, e_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return y_BTD


INJECTIONS: dict[str, Any] = {
    "openmythos": OpenMythosInjection,
    "parcae": ParcaeInjection,
    "concat": ConcatInjection,
    "none": NoInjection,
}


def register_injection(name: str, kind: type[nn.Module]) -> None:
    """Makes an injection of your own a word that `model.injection` allows, for as long as the program runs.

    kind: a Linen module with the field `config` and the methods `enter` and `leave`. Raises ConfigError if the name is
    taken by another one.
    """
    if INJECTIONS.get(name, kind) is not kind:
        taken = ", ".join(INJECTIONS)
        raise ConfigError(f"injection: got {name!r}, which is taken; allowed: a name other than {taken}")
    INJECTIONS[name] = kind
    if name not in INJECTION_NAMES:
        INJECTION_NAMES.append(name)


def _decay(rate_D: jax.Array) -> jax.Array:
    return jnp.clip(jnp.exp(-rate_D), MIN_DECAY, MAX_DECAY)


def _diagonal(init):
    return nn.with_logical_partitioning(init, ("norm",))


def loop_embedding(loop_index_B: jax.Array, dim: int) -> jax.Array:
    """Float32 [B, 1, D]: sines then cosines of the loop index on the first D // 8 channels, zero on the rest."""
    width = dim // 8  # most channels carry no trace of the loop index, as in the original
    frequencies = 1e4 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / max(width, 1))
    # As for positions, but over loops.
    angles = loop_index_B[:, None].astype(jnp.float32) * frequencies
    # An odd width drops the last cosine, as the original does.
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[:, :width]
    return jnp.pad(waves, ((0, 0), (0, dim - width)))[:, None]


class LoopLoRA(nn.Module):
    """A low-rank map of the loop's output whose rank channels are scaled by loop: ((y down) * scale_t) up.

    Loops beyond the table use its last row (arXiv 2410.20672; OpenMythos clamps likewise).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, y_BTD: jax.Array, loop_index_B: jax.Array) -> jax.Array:
        c = self.config
        rows = c.lora_loops or c.loops
        init = nn.with_logical_partitioning(nn.initializers.normal(c.std), (None, "lora"))
        scale_LR = self.param("scale", init, (rows, c.lora_rank), jnp.float32)
        # Depths beyond the table share its last row, so a model can run deeper than it was trained.
        scale_BR = jnp.asarray(scale_LR)[jnp.minimum(loop_index_B, rows - 1)].astype(y_BTD.dtype)
        low_BTR = Linear((c.lora_rank,), ("embed", "lora"), c.std, name="down")(y_BTD) * scale_BR[:, None]
        return Linear((c.dim,), ("lora", "embed"), c.std, name="up")(low_BTR)
