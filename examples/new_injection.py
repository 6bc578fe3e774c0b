"""A new way for the prelude's output to enter the loop, in 40 lines: a learned gate between the state and e.

    python examples/new_injection.py

An injection is a Linen module with two functions around the loop's layers. `enter` makes their input from the state h
and what is injected, e; `leave` makes the next state from h, e, and the output y of the layers. Once registered, its
name is a word of the config like any other: it trains, halts, decodes, shards and is saved without further code.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax import Halting, ModelConfig, Mythos, generate
from mythos_jax.model.injection import register_injection
from mythos_jax.model.layers import Linear


class GatedInjection(nn.Module):
    """Layers see g h + (1 - g) e with a gate g = sigmoid(W [h; e]) per channel; their output is added to the state."""

    config: ModelConfig

    def setup(self) -> None:
        self.gate = Linear((self.config.dim,), ("embed", "mlp"), self.config.std)

    def enter(self, h_BTD: jax.Array, e_BTD: jax.Array) -> jax.Array:
        g_BTD = nn.sigmoid(self.gate(jnp.concatenate([h_BTD, e_BTD], axis=-1)))
        return g_BTD * h_BTD + (1 - g_BTD) * e_BTD

    def leave(self, h_BTD: jax.Array, e_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return h_BTD + y_BTD


def main() -> None:
    register_injection("gated", GatedInjection)
    config = ModelConfig(dim=32, n_heads=2, n_kv_heads=2, hidden_dim=64, loops=4, injection="gated", state_norm=True)
    model, tokens_BT = Mythos(config), jnp.arange(16, dtype=jnp.int32)[None]
    variables = jax.jit(model.init)(jax.random.key(0), tokens_BT)
    print(jax.tree.map(jnp.shape, nn.unbox(variables["params"]["recurrence"]["cell"]["injection"])))

    out: Any = model.apply(variables, tokens_BT, loops=16, halting=Halting("latent", threshold=0.05))
    print(f"{float(out.loops.mean()):.1f} of 16 loops per token")
    print(generate(model, variables, tokens_BT, max_new_tokens=8).tokens)


if __name__ == "__main__":
    main()
