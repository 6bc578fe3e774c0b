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
    # A branch at run time: where all rows are greedy, nobody pays for a sort of the vocabulary.
    return jax.lax.cond((sampling.temperature_B > 0).any(), _draw, _greedy, logits_BV, sampling, position_B)


def truncate(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits in descending order, -inf where cut off, and the tokens they belong to; both [B, V].

    First the k most likely are kept (0: all), then, of their renormalised probabilities, the fewest whose sum reaches
    top_p. The most likely token always stays.
    """
    top_k_B1, top_p_B1 = top_k_B[:, None], top_p_B[:, None]
    # Stable, so that of equal logits the lower token comes first, on every platform.
    tokens_BV = jnp.argsort(logits_BV, axis=-1, stable=True, descending=True).astype(jnp.int32)
    logits_BV = jnp.take_along_axis(logits_BV, tokens_BV, axis=-1)
    ranks_V = jnp.arange(logits_BV.shape[-1])
    logits_BV = jnp.where((ranks_V < top_k_B1) | (top_k_B1 == 0), logits_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(logits_BV)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # A token stays while those before it hold less than top_p; at 1 rounding must not cut off the last ones.
    return jnp.where((before_BV < top_p_B1) | (top_p_B1 >= 1), logits_BV, -jnp.inf), tokens_BV


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
    truncated_BV, tokens_BV = truncate(sharpened_BV, sampling.top_k_B, sampling.top_p_B)

    def draw(seed: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(_key(seed, TOKENS, position), logits_V)

    rank_B = jax.vmap(draw)(sampling.seed_B, position_B, truncated_BV)
    drawn_B = jnp.take_along_axis(tokens_BV, rank_B[:, None], axis=-1)[:, 0]
    return jnp.where(random_B, drawn_B, _greedy(logits_BV, sampling, position_B))


def _key(seed: jax.Array, stream: int, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), position)
