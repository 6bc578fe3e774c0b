"""Choosing the next token, and all randomness of inference.

Everything random is a pure function of a request's seed and a position in its text: a row's result does not depend
on the batch it is in, on padding, or on how its text is cut into calls.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.state import initial_noise

TOKENS, STATES = 0, 1  # a request has two streams of random numbers


class Sampling(struct.PyTreeNode):
    """How the next token of each row is sampled. All of it is traced: other values compile nothing new.

    temperature_B: float32, 0 is greedy. top_k_B: int32, sample among the k most likely tokens; 0 is all. top_p_B:
    float32 in (0, 1], sample among the smallest set of most likely tokens that holds this mass. seed_B: uint32.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    seed_B: jax.Array


def sample(logits_BV: jax.Array, sampling: Sampling, position_B: jax.Array) -> jax.Array:
    """The tokens at `position_B`, int32 [B]; at temperature 0 exactly the argmax."""
    # A branch at run time: where all rows are greedy, nothing is drawn.
    return jax.lax.cond((sampling.temperature_B > 0).any(), _draw, _greedy, logits_BV, sampling, position_B)


def truncate(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """The logits [B, V] with -inf where they are cut off.

    First the k most likely are kept (0: all), then, of their renormalised probabilities, the fewest whose sum reaches
    top_p. The most likely token always stays.
    """
    top_k_B1, top_p_B1, rows_B1 = top_k_B[:, None], top_p_B[:, None], jnp.arange(len(logits_BV))[:, None]
    # Stable, so that of equal logits the lower token comes first, on every platform.
    tokens_BV = jnp.argsort(logits_BV, axis=-1, stable=True, descending=True)
    sorted_BV = jnp.take_along_axis(logits_BV, tokens_BV, axis=-1)
    ranks_V = jnp.arange(logits_BV.shape[-1])
    kept_BV = (ranks_V < top_k_B1) | (top_k_B1 == 0)
    probabilities_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf))
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # A token stays while those before it hold less than top_p; at 1 rounding must not cut off the last ones.
    kept_BV &= (before_BV < top_p_B1) | (top_p_B1 >= 1)
    return jnp.where(jnp.zeros_like(kept_BV).at[rows_B1, tokens_BV].set(kept_BV), logits_BV, -jnp.inf)


def position_noise(config: ModelConfig, seed_B: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The noise that states start from, float32 [B, T, D], drawn for each position independently.

    Decoding token by token then starts every token exactly as a full forward pass over the same positions does.
    """

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return initial_noise(config, _key(seed, STATES, position), (config.dim,))

    return jax.vmap(jax.vmap(noise, in_axes=(None, 0)))(seed_B, positions_BT)


def starting_state(
    config: ModelConfig, initial_state: str | None, seed_B: jax.Array, positions_BT: jax.Array
) -> jax.Array | str | None:
    """What `Mythos.begin` takes as `initial_state` for tokens at these positions."""
    if initial_state is None and config.initial_state == "noise":
        return position_noise(config, seed_B, positions_BT)
    return initial_state


def _greedy(logits_BV: jax.Array, sampling: Sampling, position_B: jax.Array) -> jax.Array:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _draw(logits_BV: jax.Array, sampling: Sampling, position_B: jax.Array) -> jax.Array:
    random_B = sampling.temperature_B > 0
    temperature_B = jnp.where(random_B, sampling.temperature_B, 1)
    # Relative to the largest, so that even a tiny temperature does not overflow.
    sharpened_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature_B[:, None]
    cuts = ((sampling.top_k_B > 0) | (sampling.top_p_B < 1)) & random_B
    # The vocabulary is sorted only if a row cuts it.
    kept_BV = jax.lax.cond(
        cuts.any(), truncate, lambda logits_BV, *_: logits_BV, sharpened_BV, sampling.top_k_B, sampling.top_p_B
    )

    def draw(seed: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(_key(seed, TOKENS, position), logits_V)

    # The noise belongs to a token and not to its rank: a draft and the final logits then mostly draw the same token.
    drawn_B = jax.vmap(draw)(sampling.seed_B, position_B, kept_BV).astype(jnp.int32)
    return jnp.where(random_B, drawn_B, _greedy(logits_BV, sampling, position_B))


def _key(seed: jax.Array, stream: int, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), position)
