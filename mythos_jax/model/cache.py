"""What attention layers keep: explicit, preallocated arrays, written in place under jit.

One structure serves three needs: a key-value cache for decoding (one slot per loop for layers in the loop), the keys
and values of a token's last loop (kept while its state is frozen), both, or neither.

A decode cache has a stretch of memory for each row, or it is a pool of pages that rows share through a table of pages.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.layers import compute_dtype
from mythos_jax.sharding import constrain

LOOP_CACHES = "all, last, first, or modulo:N with N >= 1"


def loop_slots(loop_cache: str, loops: int) -> int:
    """Slots for the layers in the loop of a cache by this rule, for calls of up to `loops` loops.

    all: a slot for each loop. A token at loop t attends to what others left in loop t: decoding is exact.
    The other rules bound the memory at any depth. Loops share slots, so that a token at loop t sees what others left in
    a later loop of the same slot: decoding is an approximation. (A model with `loop_kv: first` is trained so that one
    slot is exact.)
    last: one slot; of each token the last loop that it ran is kept. first: one slot for the first loop, one for all
    later ones. modulo:N: loop t has slot t mod N.

    Raises ConfigError for another rule.
    """
    name, _, number = str(loop_cache).partition(":")
    if name == "modulo" and number.isascii() and number.isdigit() and int(number) > 0:
        return int(number)
    slots = {"all": loops, "last": 1, "first": 2}.get(loop_cache)
    if slots is None:
        raise ConfigError(f"loop_cache: got {loop_cache!r}, allowed: {LOOP_CACHES}")
    return slots


def loop_cache_for(config: ModelConfig, loop_cache: str, loops: int) -> str:
    """The rule to follow in calls of up to `loops` loops: "all" where nothing is approximate, since no two of them
    would share a slot, or since the model has one slot by itself."""
    return "all" if config.loop_kv == "first" or loop_slots(loop_cache, loops) >= loops else loop_cache


def model_slots(config: ModelConfig, loop_cache: str, loops: int) -> int:
    """`loop_slots` of a model: one where all loops attend to the keys and values of the first."""
    slots = loop_slots(loop_cache, loops)  # also checks the rule
    return 1 if config.loop_kv == "first" else slots


class KV(NamedTuple):
    """Keys and values of one layer. gqa: [..., G, K] each. mla: [..., R + rope], the latent followed by the RoPE key
    that all heads share, and no values."""

    keys: jax.Array
    values: jax.Array | None


class LayerCache(struct.PyTreeNode):
    """What one layer keeps; a field is None where nothing is kept.

    kv: [slots, B, S, ...], the decode cache. exit_kv: [B, T, ...], keys and values of the current tokens from the last
    loop that they ran, or from the first where all loops attend to those (`loop_kv`).
    pages: int32 [B, N] where `kv` is a pool of pages, [slots, pages, tokens of a page, ...]. Block n of row b is page
    pages[b, n]; an entry equal to the number of pages is no page: nothing is written there, and zeros are read.
    loop_cache: which slot a loop writes and reads, see `loop_slots`.
    expert_sums: only in training, and not for attention: where the gradients of the layer's experts are added up, see
    `start_gradient_sums`.
    """

    kv: KV | None = None
    exit_kv: KV | None = None
    pages: jax.Array | None = None
    expert_sums: tuple[jax.Array, jax.Array, jax.Array] | None = None
    loop_cache: str = struct.field(pytree_node=False, default="all")

    @property
    def slots(self) -> int:
        assert self.kv is not None
        return self.kv.keys.shape[0]

    def slot(self, loop: jax.Array) -> jax.Array:
        """Of loop t. As long as t is below `slots`, no rule shares one."""
        return jnp.minimum(loop, self.slots - 1) if self.loop_cache == "first" else loop % self.slots

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        assert self.kv is not None
        size = self.kv.keys.shape[2]
        return size if self.pages is None else self.pages.shape[1] * size

    def write(self, slot: jax.Array, index_BT: jax.Array, new: KV) -> "LayerCache":
        """Writes the keys and values of tokens, [B, T, ...], at these positions of their rows; nothing for positions
        beyond the capacity. slot: int32 [] or [B, 1]. In place under jit, since the cache is donated."""
        assert self.kv is not None
        if self.pages is None:
            at = slot, jnp.arange(index_BT.shape[0])[:, None], index_BT
        else:
            n_pages, size = self.kv.keys.shape[1:3]
            # Beyond the table there is no page either.
            page_BT = jnp.take_along_axis(self.pages, index_BT // size, axis=1, mode="fill", fill_value=n_pages)
            at = slot, page_BT, index_BT % size
        kv = jax.tree.map(lambda c, n: c.at[at].set(n.astype(c.dtype), mode="drop"), self.kv, new)
        return self.replace(kv=constrain_cache(kv, self.pages is not None))  # else a scatter may leave it replicated

    def read(self, slot: jax.Array, index_BT: jax.Array) -> KV:
        """Keys and values [B, S, ...] of all positions that the queries at `index_BT` may attend to. slot: int32 [] or
        [B, 1]."""
        assert self.kv is not None
        if self.pages is None:
            if jnp.ndim(slot) == 0:  # one slice, which is not copied
                return jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, slot, keepdims=False), self.kv)
            return jax.tree.map(lambda c: c[slot[:, 0], jnp.arange(len(slot))], self.kv)
        # What an earlier user of a page left behind is hidden by a weight of 0, unless it is NaN or infinite.
        written_BS = jnp.arange(self.capacity) <= index_BT.max(axis=1, keepdims=True)

        def gather(pool: jax.Array) -> jax.Array:
            blocks = pool.at[slot, self.pages].get(mode="fill", fill_value=0)
            rows = blocks.reshape(*written_BS.shape, *blocks.shape[3:])
            return jnp.where(broadcast_mask(written_BS, rows), rows, 0)

        return jax.tree.map(gather, self.kv)


class Cache(struct.PyTreeNode):
    """The decode cache of a model; `length_B` int32 counts the tokens that each row holds.

    Of `init_paged_cache` it is a pool, which any rows can use: `at` says which pages hold their tokens, and `pool`
    takes the pool back out after a call.
    """

    prelude: tuple[LayerCache, ...]
    loop: tuple[LayerCache, ...]
    coda: tuple[LayerCache, ...]
    length_B: jax.Array

    @property
    def max_loops(self) -> int | None:
        """Loops that a call may run; None where loops share slots."""
        return self.loop[0].slots if self.loop[0].loop_cache == "all" else None

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return (*self.prelude, *self.loop, *self.coda)[0].capacity

    def at(self, pages_BN: jax.Array, length_B: jax.Array) -> "Cache":
        """The pool as rows that hold `length_B` tokens see it through this table of pages (`LayerCache.pages`). Rows
        may share pages; what several rows of a call write, all of them read."""
        return self._with_pages(pages_BN, length_B)

    def pool(self) -> "Cache":
        """The pool without rows."""
        return self._with_pages(None, jnp.zeros((0,), jnp.int32))

    def _with_pages(self, pages_BN: jax.Array | None, length_B: jax.Array) -> "Cache":
        groups = {
            name: tuple(layer.replace(pages=pages_BN) for layer in getattr(self, name))
            for name in ("prelude", "loop", "coda")
        }
        return self.replace(**groups, length_B=length_B)


def empty_kv(config: ModelConfig, *shape: int) -> KV:
    """Zeros for the keys and values of tokens of this shape."""
    dtype = compute_dtype(config)
    if config.attention == "mla":  # the latent and the shared key are one array: one write and one read per layer
        return KV(jnp.zeros((*shape, config.kv_lora_rank + config.qk_rope_head_dim), dtype), None)
    return KV(*(jnp.zeros((*shape, config.n_kv_heads, config.gqa_head_dim), dtype) for _ in range(2)))


def constrain_cache(kv: KV, paged: bool = False) -> KV:
    """A cache [slots, B, S, ...], placed on the mesh in use: rows over the batch axes, positions over sequence, heads
    over tensor. paged: it is a pool [slots, pages, tokens of a page, ...]; only its heads are divided, since any row
    may use any page."""
    # A latent belongs to all heads, so the tensor axis cannot split it.
    heads = ("latent",) if kv.values is None else ("kv_heads", None)
    tokens = ("pages", "page") if paged else ("batch", "cache_length")
    return jax.tree.map(lambda x: constrain(x, "slots", *tokens, *heads), kv)


@partial(jax.jit, static_argnames=("config", "batch", "capacity", "loops", "loop_cache"))
def init_cache(
    config: ModelConfig, batch: int, capacity: int, loops: int | None = None, loop_cache: str = "all"
) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens.

    loops: the maximum that any call will run (default: the config's). loop_cache: how loops share memory, "all" (each
    has its own), "last", "first" or "modulo:N"; see `loop_slots`. Raises ConfigError for another rule.
    """
    cache = _empty_cache(config, batch, capacity, loops, loop_cache, paged=False)
    return cache.replace(length_B=jnp.zeros((batch,), jnp.int32))


@partial(jax.jit, static_argnames=("config", "pages", "page_size", "loops", "loop_cache"))
def init_paged_cache(
    config: ModelConfig, pages: int, page_size: int, loops: int | None = None, loop_cache: str = "all"
) -> Cache:
    """An empty pool of `pages` pages of `page_size` tokens each, without rows: see `Cache.at`. loops and
    loop_cache: as in `init_cache`."""
    return _empty_cache(config, pages, page_size, loops, loop_cache, paged=True)


def _empty_cache(config: ModelConfig, rows: int, size: int, loops: int | None, loop_cache: str, paged: bool) -> Cache:
    """Rows, or pages, of `size` tokens each; the lengths of rows are still to come."""

    def layers(n: int, slots: int, loop_cache: str = "all") -> tuple[LayerCache, ...]:
        kv = (constrain_cache(empty_kv(config, slots, rows, size), paged) for _ in range(n))
        return tuple(LayerCache(kv=each, loop_cache=loop_cache) for each in kv)

    rule = "last" if config.loop_kv == "first" else loop_cache  # one slot, for any number of loops
    return Cache(
        prelude=layers(config.prelude_layers, 1),
        loop=layers(config.loop_layers, model_slots(config, loop_cache, loops or config.loops), rule),
        coda=layers(config.coda_layers, 1),
        length_B=jnp.zeros((0,), jnp.int32),
    )


def update_cache(
    cache: LayerCache,
    new: KV,
    *,
    loop: jax.Array | int,
    index_BT: jax.Array | None,
    frozen_BT: jax.Array | None,
    first_only: bool = False,
) -> tuple[LayerCache, KV]:
    """Writes the current tokens' keys and values; returns the updated cache and everything queries may attend to.

    loop: t, one for all rows or int32 [B]; it writes and reads the slot of loop t, at `index_BT`. An index beyond the
    capacity writes nothing. Frozen tokens keep the keys and values of the last loop that they ran, and write those to
    the slots of loops that they did not run. first_only: of the first loop alone, which all later ones read.
    """
    loop = jnp.asarray(loop)
    if loop.ndim == 1:
        loop = loop[:, None]
    kept = frozen_BT
    if first_only:
        kept = loop > 0 if frozen_BT is None else frozen_BT | (loop > 0)
    if cache.exit_kv is not None and kept is not None:
        # Computed for all tokens and then undone for frozen ones: shapes must not depend on who has halted.
        new = jax.tree.map(lambda a, b: jnp.where(broadcast_mask(kept, b), a, b), cache.exit_kv, new)
        cache = cache.replace(exit_kv=new)
    if cache.kv is None or index_BT is None:
        return cache, new
    written_BT = index_BT
    if kept is not None:
        # From loop `slots` on, every slot holds a loop that the token ran, or its last one.
        written_BT = jnp.where(kept & (loop >= cache.slots), cache.capacity, index_BT)
    cache = cache.write(cache.slot(loop), written_BT, new)
    return cache, cache.read(cache.slot(loop), index_BT)


def fill_skipped_loops(
    caches: tuple[LayerCache, ...],
    exit_kv: tuple[KV, ...],
    ended: jax.Array,
    index_BT: jax.Array,
    tokens_BT: jax.Array,
) -> tuple[LayerCache, ...]:
    """Copies the exit keys and values of `tokens_BT` (bool) to every slot from `ended` on: those of the loops that
    these tokens skip, in which deeper tokens will look for them. Slots that are shared hold a loop that they ran.

    caches, exit_kv: one for each layer of the loop. ended: int32 [] or, one per row, [B]. In place: of a prompt
    slot by slot, so that a token pays only for what it skipped and nothing of the cache's size is made; of single
    tokens all slots at once.
    """
    slots, capacity, first = caches[0].slots, caches[0].capacity, ended
    if index_BT.shape[1] == 1:  # decoding: all slots in one write, most of which are dropped
        slots_BS = jnp.broadcast_to(jnp.arange(slots), (index_BT.shape[0], slots))
        skipped_BS = tokens_BT & (slots_BS >= jnp.reshape(ended, (-1, 1)))
        at_BS = jnp.where(skipped_BS, index_BT, capacity)
        spread = jax.tree.map(lambda x: jnp.broadcast_to(x, (*at_BS.shape, *x.shape[2:])), exit_kv)
        return tuple(cache.write(slots_BS, at_BS, kv) for cache, kv in zip(caches, spread, strict=True))
    if jnp.ndim(ended) == 1:
        first = jnp.where(tokens_BT, ended[:, None], slots).min()

    def fill(slot: jax.Array, caches: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
        fills_BT = tokens_BT if jnp.ndim(ended) == 0 else tokens_BT & (slot >= ended[:, None])
        # Nothing is written at the capacity.
        at_BT = jnp.where(fills_BT, index_BT, capacity)
        return tuple(cache.write(slot, at_BT, kv) for cache, kv in zip(caches, exit_kv, strict=True))

    return jax.lax.fori_loop(first, slots, fill, caches)


def broadcast_mask(mask_BT: jax.Array, x: jax.Array) -> jax.Array:
    """The mask with trailing axes of 1, to broadcast against x."""
    return mask_BT.reshape(mask_BT.shape + (1,) * (x.ndim - mask_BT.ndim))
