"""Scaled dot-product attention with grouped heads, in the form that suits the platform and the lengths."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mythos_jax.ops.blockwise import blockwise
from mythos_jax.sharding import in_use, placement, platform

# What rematerialisation policies call the result of attention and all else that its backward pass needs kept.
SAVED = "attention"
# So few queries have few scores, whatever the number of keys: they are made whole.
FEW = 16


@struct.dataclass
class Mask:
    """Who may attend to whom, kept as structure so that a kernel can use it without a [T, S] array.

    index_BT: where each query stands among the keys; key s is seen when s <= index. None: query t stands at key t.
    segments_BT: queries see only keys of their own segment (no cache only). None: one segment.
    """

    index_BT: jax.Array | None = None
    segments_BT: jax.Array | None = None

    def index(self, T: int) -> jax.Array:
        """[B or 1, T]."""
        return jnp.arange(T, dtype=jnp.int32)[None] if self.index_BT is None else self.index_BT

    def dense(self, T: int, S: int) -> jax.Array:
        """Bool [B or 1, T, S], true where attention is allowed."""
        allowed = jnp.arange(S) <= self.index(T)[..., None]
        if self.segments_BT is not None:
            allowed &= self.segments_BT[:, :, None] == self.segments_BT[:, None, :]
        return allowed


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """softmax(scale q k^T) v, [B, T, H, V]; kv head g serves query heads g H/G … (g+1) H/G - 1; softmax in float32.

    Up to FEW queries (decoding) have their scores made whole, which the compiler partitions. More are attended to by
    each device for its rows, heads and queries, over all keys, block by block.
    """
    if q_BTHK.shape[1] <= FEW:
        return checkpoint_name(whole(q_BTHK, k_BSGK, v_BSGV, mask, scale), SAVED)
    # On a CPU blocks are made to fit its cache; elsewhere they are as large as is of use.
    general = partial(blockwise, scale=scale, name=SAVED, block=None if platform() == "cpu" else 512)
    return _by_device(general, q_BTHK, k_BSGK, v_BSGV, mask)


def whole(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """With all scores at a time, [B, G, H / G, T, S]."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BTGNK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("BTGNK,BSGK->BGNTS", q_BTGNK, k_BSGK, preferred_element_type=jnp.float32) * scale
    allowed = mask.dense(T, S)[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)
    out = jnp.einsum("BGNTS,BSGV->BTGNV", weights.astype(v_BSGV.dtype), v_BSGV)
    return out.reshape(B, T, H, v_BSGV.shape[-1])


def _by_device(form: Callable[..., jax.Array], q_BTHK, k_BSGK, v_BSGV, mask: Mask) -> jax.Array:
    """form(queries, keys, values, index, (segments of queries, of keys) or None), by each device for its part."""
    index_BT, segments = mask.index(q_BTHK.shape[1]), mask.segments_BT
    arguments = q_BTHK, k_BSGK, v_BSGV, index_BT, None if segments is None else (segments, segments)
    if not in_use():
        return form(*arguments)
    rows, length, heads, _ = placement(q_BTHK.shape, ("batch", "length", "heads", None))
    if heads:  # each device needs a kv head of its own, and has query heads of no more kv heads than that
        G = k_BSGK.shape[2]
        copies = math.lcm(G, _ways(heads)) // G
        arguments = q_BTHK, *(jnp.repeat(x, copies, axis=2) for x in (k_BSGK, v_BSGV)), *arguments[3:]
    of_queries, of_keys = PartitionSpec(rows, length, heads), PartitionSpec(rows, None, heads)
    of_index = PartitionSpec(rows if len(index_BT) > 1 else None, length)
    of_segments = None if segments is None else (PartitionSpec(rows, length), PartitionSpec(rows))
    in_specs = of_queries, of_keys, of_keys, of_index, of_segments
    return jax.shard_map(form, in_specs=in_specs, out_specs=of_queries, check_vma=False)(*arguments)


def _ways(axes: str | tuple[str, ...]) -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
