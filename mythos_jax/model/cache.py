"""What attention layers remember: explicit, preallocated arrays, written in place under jit.

One structure serves three needs: a key-value cache for decoding (one slot per loop for layers in the loop), the keys
and values of a token's previous loop (kept while its state is frozen), both, or neither.
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
    """Keys and values of one layer: gqa [..., G, K] each; mla: [..., R + rope], latent then shared key, no values."""

    keys: jax.Array
    values: jax.Array | None


@struct.dataclass
class Memory:
    """The memory of one attention layer. None where nothing is kept."""

    cache: KV | None = None  # [slots, B, S, ...]
    last: KV | None = None  # [B, T, ...], what these tokens' keys and values were in the loop before


@struct.dataclass
class Cache:
    """The decode cache of a model; `length_B` int32 counts the tokens each row holds."""

    prelude: tuple[Memory, ...]
    loop: tuple[Memory, ...]
    coda: tuple[Memory, ...]
    length_B: jax.Array
    loop_slots: int = struct.field(pytree_node=False)
    bounded: bool = struct.field(pytree_node=False)  # loop t uses slot t mod loop_slots

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return jax.tree.leaves((self.prelude, self.loop, self.coda))[0].shape[2]


def empty_kv(config: ModelConfig, *shape: int) -> KV:
    """Zeros for the keys and values of tokens of this shape."""
    dtype = compute_dtype(config)
    if config.attention == "mla":
        return KV(jnp.zeros((*shape, config.kv_lora_rank + config.qk_rope_head_dim), dtype), None)
    return KV(*(jnp.zeros((*shape, config.n_kv_heads, config.gqa_head_dim), dtype) for _ in range(2)))


def placed(kv: KV) -> KV:
    """A cache [slots, B, S, ...] where the mesh in use wants it: rows over the batch axes, positions over
    sequence, heads over tensor."""
    heads = ("latent",) if kv.values is None else ("kv_heads", None)
    return jax.tree.map(lambda x: constrain(x, "slots", "batch", "cache_length", *heads), kv)


@partial(jax.jit, static_argnames=("config", "batch", "capacity", "loops", "loop_cache_slots"))
def init_cache(
    config: ModelConfig, batch: int, capacity: int, loops: int | None = None, loop_cache_slots: int | None = None
) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens.

    loops: the most loops any call will run (default: the config's); each gets a slot. loop_cache_slots: bounds the
    memory whatever the depth, loop t then shares slot t mod n, and decoding is an approximation. Raises ConfigError
    for less than one slot.
    """
    slots = loops or config.loops
    if loop_cache_slots is not None:
        check_field(loop_cache_slots >= 1, "loop_cache_slots", loop_cache_slots, "an integer >= 1, or None")
        slots = loop_cache_slots

    def layers(n: int, slots: int) -> tuple[Memory, ...]:
        return tuple(Memory(cache=placed(empty_kv(config, slots, batch, capacity))) for _ in range(n))

    return Cache(
        prelude=layers(config.prelude_layers, 1),
        loop=layers(config.loop_layers, slots),
        coda=layers(config.coda_layers, 1),
        length_B=jnp.zeros((batch,), jnp.int32),
        loop_slots=slots,
        bounded=loop_cache_slots is not None,
    )


def remember(
    memory: Memory, new: KV, *, loop: jax.Array | int, index_BT: jax.Array | None, frozen_BT: jax.Array | None
) -> tuple[Memory, KV]:
    """Takes in the keys and values of the tokens at hand; returns the memory and all that queries may look at.

    Loop t writes slot t mod n, at `index_BT`; an index beyond the capacity writes nothing. Frozen tokens keep the keys
    and values of their exit loop (design: halting semantics), and write them to slots that they never ran a loop in.
    """
    if memory.last is not None:
        new = jax.tree.map(lambda a, b: jnp.where(_like(frozen_BT, b), a, b), memory.last, new)
        memory = memory.replace(last=new)
    if memory.cache is None:
        return memory, new
    slots, _, capacity = memory.cache.keys.shape[:3]
    if frozen_BT is not None:
        # From loop n on every slot holds a loop that the token ran, or its last one.
        index_BT = jnp.where(frozen_BT & (loop >= slots), capacity, index_BT)
    rows, slot = jnp.arange(index_BT.shape[0])[:, None], loop % slots
    cache = jax.tree.map(lambda c, n: c.at[slot, rows, index_BT].set(n.astype(c.dtype), mode="drop"), memory.cache, new)
    cache = placed(cache)
    seen = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, slot, keepdims=False), cache)
    return memory.replace(cache=cache), seen


def fill_deeper(memory: Memory, first_slot: jax.Array, index_BT: jax.Array) -> Memory:
    """Copies the tokens' last keys and values to every slot from `first_slot` on: loops they exited before.

    Slot by slot and in place, so that a token pays only for what it skipped and nothing of the cache's size is made.
    """
    rows = jnp.arange(index_BT.shape[0])[:, None]

    def fill(slot: jax.Array, cache: KV) -> KV:
        return jax.tree.map(
            lambda c, last: c.at[slot, rows, index_BT].set(last.astype(c.dtype), mode="drop"), cache, memory.last
        )

    slots = memory.cache.keys.shape[0]
    return memory.replace(cache=jax.lax.fori_loop(first_slot, slots, fill, memory.cache))


def _like(mask_BT: jax.Array, x: jax.Array) -> jax.Array:
    """The mask with trailing axes of 1, to broadcast against x."""
    return mask_BT.reshape(mask_BT.shape + (1,) * (x.ndim - mask_BT.ndim))
