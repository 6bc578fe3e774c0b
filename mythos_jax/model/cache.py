"""What attention layers keep: explicit, preallocated arrays, written in place under jit.

One structure serves three needs: a key-value cache for decoding (one slot per loop for layers in the loop), the keys
and values of a token's last loop (kept while its state is frozen), both, or neither.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.layers import compute_dtype
from mythos_jax.sharding import constrain
from mythos_jax.typed import check_field


class KV(NamedTuple):
    """Keys and values of one layer. gqa: [..., G, K] each. mla: [..., R + rope], the latent followed by the RoPE key
    that all heads share, and no values."""

    keys: jax.Array
    values: jax.Array | None


class LayerCache(struct.PyTreeNode):
    """What one attention layer keeps; a field is None where nothing is kept.

    kv: [slots, B, S, ...], the decode cache; loop t writes slot t mod slots. exit_kv: [B, T, ...], keys and values of
    the current tokens from the last loop that they ran.
    """

    kv: KV | None = None
    exit_kv: KV | None = None


class Cache(struct.PyTreeNode):
    """The decode cache of a model; `length_B` int32 counts the tokens that each row holds."""

    prelude: tuple[LayerCache, ...]
    loop: tuple[LayerCache, ...]
    coda: tuple[LayerCache, ...]
    length_B: jax.Array
    loop_slots: int = struct.field(pytree_node=False)
    bounded: bool = struct.field(pytree_node=False)  # fewer slots than loops: loop t uses slot t mod loop_slots

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return jax.tree.leaves((self.prelude, self.loop, self.coda))[0].shape[2]


def empty_kv(config: ModelConfig, *shape: int) -> KV:
    """Zeros for the keys and values of tokens of this shape."""
    dtype = compute_dtype(config)
    if config.attention == "mla":  # the latent and the shared key are one array: one write and one read per layer
        return KV(jnp.zeros((*shape, config.kv_lora_rank + config.qk_rope_head_dim), dtype), None)
    return KV(*(jnp.zeros((*shape, config.n_kv_heads, config.gqa_head_dim), dtype) for _ in range(2)))


def constrain_cache(kv: KV) -> KV:
    """A cache [slots, B, S, ...], placed on the mesh in use: rows over the batch axes, positions over sequence, heads
    over tensor."""
    # A latent belongs to all heads, so the tensor axis cannot split it.
    heads = ("latent",) if kv.values is None else ("kv_heads", None)
    return jax.tree.map(lambda x: constrain(x, "slots", "batch", "cache_length", *heads), kv)


@partial(jax.jit, static_argnames=("config", "batch", "capacity", "loops", "loop_cache_slots"))
def init_cache(
    config: ModelConfig, batch: int, capacity: int, loops: int | None = None, loop_cache_slots: int | None = None
) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens.

    loops: the maximum that any call will run (default: the config's); each loop gets a slot. loop_cache_slots: bounds
    the memory at any depth. Loop t then shares slot t mod n, and decoding is an approximation. Raises ConfigError for
    fewer than one slot.
    """
    # One slot per loop: a token at loop t attends to keys and values that others made in loop t.
    slots = loops or config.loops
    if loop_cache_slots is not None:
        check_field(loop_cache_slots >= 1, "loop_cache_slots", loop_cache_slots, "an integer >= 1, or None")
        slots = loop_cache_slots

    def layers(n: int, slots: int) -> tuple[LayerCache, ...]:
        return tuple(LayerCache(kv=constrain_cache(empty_kv(config, slots, batch, capacity))) for _ in range(n))

    return Cache(
        prelude=layers(config.prelude_layers, 1),
        loop=layers(config.loop_layers, slots),
        coda=layers(config.coda_layers, 1),
        length_B=jnp.zeros((batch,), jnp.int32),
        loop_slots=slots,
        bounded=loop_cache_slots is not None,
    )


def update_cache(
    cache: LayerCache, new: KV, *, loop: jax.Array | int, index_BT: jax.Array | None, frozen_BT: jax.Array | None
) -> tuple[LayerCache, KV]:
    """Writes the current tokens' keys and values; returns the updated cache and everything queries may attend to.

    loop: t, one for all rows or int32 [B]; it writes slot t mod slots, at `index_BT`. An index beyond the capacity
    writes nothing. Frozen tokens keep the keys and values of the last loop that they ran, and write those to the slots
    of loops that they did not run.
    """
    if cache.exit_kv is not None and frozen_BT is not None:
        # Computed for all tokens and then undone for frozen ones: shapes must not depend on who has halted.
        new = jax.tree.map(lambda a, b: jnp.where(broadcast_mask(frozen_BT, b), a, b), cache.exit_kv, new)
        cache = cache.replace(exit_kv=new)
    if cache.kv is None or index_BT is None:
        return cache, new
    slots, _, capacity = cache.kv.keys.shape[:3]
    loop, by_row = jnp.asarray(loop), jnp.ndim(loop) == 1
    rows, slot = jnp.arange(index_BT.shape[0]), loop % slots
    if frozen_BT is not None:
        # From loop `slots` on, every slot holds a loop that the token ran, or its last one.
        beyond = (loop >= slots)[:, None] if by_row else loop >= slots
        index_BT = jnp.where(frozen_BT & beyond, capacity, index_BT)
    # Scattered in place under jit, since the cache is donated.
    at = (slot[:, None] if by_row else slot, rows[:, None], index_BT)
    kv = jax.tree.map(lambda c, n: c.at[at].set(n.astype(c.dtype), mode="drop"), cache.kv, new)
    kv = constrain_cache(kv)  # else a scatter may leave it replicated
    if by_row:
        seen = jax.tree.map(lambda c: c[slot, rows], kv)
    else:  # one slice, which is not copied
        seen = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, slot, keepdims=False), kv)
    return cache.replace(kv=kv), seen


def fill_skipped_loops(
    cache: LayerCache, first_slot: jax.Array, index_BT: jax.Array, tokens_BT: jax.Array
) -> LayerCache:
    """Copies the exit keys and values of `tokens_BT` (bool) to every slot from `first_slot` on: the loops that these
    tokens exited before, in which deeper tokens will look for them.

    first_slot: int32 [] or, one per row, [B]. Slot by slot and in place, so that a token pays only for what it skipped
    and nothing of the cache's size is made.
    """
    assert cache.kv is not None
    slots, _, capacity = cache.kv.keys.shape[:3]
    # An index at the capacity is out of bounds, and what is written there is dropped.
    rows, first = jnp.arange(index_BT.shape[0])[:, None], first_slot
    if jnp.ndim(first_slot) == 1:
        first = jnp.where(tokens_BT, first_slot[:, None], slots).min()

    def fill(slot: jax.Array, kv: KV) -> KV:
        fills_BT = tokens_BT if jnp.ndim(first_slot) == 0 else tokens_BT & (slot >= first_slot[:, None])
        at = (slot, rows, jnp.where(fills_BT, index_BT, capacity))
        return jax.tree.map(lambda c, exit: c.at[at].set(exit.astype(c.dtype), mode="drop"), kv, cache.exit_kv)

    return cache.replace(kv=jax.lax.fori_loop(first, slots, fill, cache.kv))


def broadcast_mask(mask_BT: jax.Array, x: jax.Array) -> jax.Array:
    """The mask with trailing axes of 1, to broadcast against x."""
    return mask_BT.reshape(mask_BT.shape + (1,) * (x.ndim - mask_BT.ndim))
