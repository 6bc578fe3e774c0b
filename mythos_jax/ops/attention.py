"""Scaled dot-product attention with grouped heads; the implementation depends on the platform and the shapes.

Shape suffixes: B rows, T queries, S keys, H query heads, G key-value heads, K width of queries and keys, V width of
values, N = H / G query heads per key-value head.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mythos_jax.ops import splash_attention
from mythos_jax.ops.blockwise import blockwise_attention
from mythos_jax.ops.slower import say_slower
from mythos_jax.sharding import axis_size, in_use, is_nvidia, partition_spec, platform

# The name by which rematerialisation policies know the output of attention and its other residuals.
SAVED = "attention"
# Up to this many queries (decoding), the full score matrix is small, whatever the number of keys.
MAX_DENSE_QUERIES = 16

# Attention on one device: queries, keys, values, index_BT and the segment ids of (queries, keys) to [B, T, H, V].
Segments = tuple[jax.Array, jax.Array] | None
AttentionFunction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Segments], jax.Array]

_QUERY_AXES = ("batch", "length", "heads", None)


@struct.dataclass
class Mask:
    """Which keys each query may attend to, as a structure that a kernel can use without a [T, S] array.

    index_BT: int32, the position of each query among the keys; it sees key s if s <= index. None: query t is at key t.
    segments_BT: int32, queries see only keys of their own segment (not with a cache). None: one segment.
    """

    index_BT: jax.Array | None = None
    segments_BT: jax.Array | None = None

    def index(self, T: int) -> jax.Array:
        """Int32 [B or 1, T]."""
        return jnp.arange(T, dtype=jnp.int32)[None] if self.index_BT is None else self.index_BT

    def dense(self, T: int, S: int) -> jax.Array:
        """Bool [B or 1, T, S], true where attention is allowed."""
        allowed = jnp.arange(S) <= self.index(T)[..., None]
        if self.segments_BT is not None:
            allowed &= self.segments_BT[:, :, None] == self.segments_BT[:, None, :]
        return allowed


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """softmax(scale q k^T) v, [B, T, H, V]. Softmax in float32; kv head g serves query heads g N … (g + 1) N - 1.

    For at most MAX_DENSE_QUERIES queries (decoding) the full score matrix is built, and XLA partitions it. Otherwise
    each device attends from its own rows, heads and queries to all keys: on a TPU with the splash kernel, if there is
    no cache and the kernel supports the shapes; on a GPU with cuDNN, if it accepts the operands; in all other
    cases with `blockwise_attention`.
    """
    if q_BTHK.shape[1] <= MAX_DENSE_QUERIES:
        return checkpoint_name(dense_attention(q_BTHK, k_BSGK, v_BSGV, mask, scale), SAVED)
    attention = _select_implementation(q_BTHK, k_BSGK, v_BSGV, mask, scale)
    return _per_device(attention, q_BTHK, k_BSGK, v_BSGV, mask)


def dense_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """The definition: attention that holds all scores, [B, G, N, T, S], at once."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BTGNK = q_BTHK.reshape(B, T, G, H // G, K)
    scores_BGNTS = jnp.einsum("BTGNK,BSGK->BGNTS", q_BTGNK, k_BSGK, preferred_element_type=jnp.float32) * scale
    allowed = mask.dense(T, S)[:, None, None]
    weights_BGNTS = jax.nn.softmax(jnp.where(allowed, scores_BGNTS, jnp.finfo(jnp.float32).min), axis=-1)
    # Values by head first: XLA for CPUs would else transpose them to channels by keys, which takes longer.
    out_BGNTV = jnp.einsum("BGNTS,BGSV->BGNTV", weights_BGNTS.astype(v_BSGV.dtype), v_BSGV.swapaxes(1, 2))
    return jnp.moveaxis(out_BGNTV, 3, 1).reshape(B, T, H, v_BSGV.shape[-1])


def _select_implementation(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask, scale: float
) -> AttentionFunction:
    # There is no kernel for a CPU, nor one that takes a cache.
    if platform() != "cpu" and mask.index_BT is None:
        kernel = _kernel(q_BTHK, k_BSGK, v_BSGV, mask, scale)
        if kernel is not None:
            return kernel
    # On a CPU the block size follows the processor's cache. Accelerators get the largest block that is still useful.
    max_block = None if platform() == "cpu" else 512
    return partial(blockwise_attention, scale=scale, checkpoint_name=SAVED, max_block=max_block)


def _kernel(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask, scale: float
) -> AttentionFunction | None:
    """The accelerator's kernel, without a cache. Says why, if there is none for these operands."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    n_shards = _shard_count(partition_spec(q_BTHK.shape, _QUERY_AXES)[1]) if in_use() else 1
    if platform() == "tpu":
        if splash_attention.supports(T, S, n_shards):
            return partial(_splash, scale=scale, n_shards=n_shards)
        kernel, reason = "the splash kernel", f"it does not take {T} queries and {S} keys on {n_shards} shards"
    elif is_nvidia():
        why_not = _why_not_cudnn(q_BTHK, v_BSGV, mask, n_shards)
        if why_not is None:
            return partial(_cudnn, scale=scale)
        kernel, reason = "cuDNN's kernel", why_not
    else:
        kernel, reason = "a kernel", f"none for a {platform()}"
    say_slower("attention in blocks", kernel, reason)
    return None


def _splash(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    _index_BT: jax.Array,
    segments: Segments,
    scale: float,
    n_shards: int,
) -> jax.Array:
    shard = (jax.lax.axis_index("sequence"), n_shards) if n_shards > 1 else (0, 1)
    return splash_attention.splash_attention(q_BTHK, k_BSGK, v_BSGV, segments, scale, SAVED, shard)


def _why_not_cudnn(q_BTHK: jax.Array, v_BSGV: jax.Array, mask: Mask, n_shards: int) -> str | None:
    """What cuDNN's flash attention does not accept, on one of the GPUs that have it; None: it accepts all. It is not
    asked where there is a cache."""
    width = max(q_BTHK.shape[-1], v_BSGV.shape[-1])
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it does not take {q_BTHK.dtype}"
    if mask.segments_BT is not None:
        return "it does not take a mask of documents"
    if n_shards > 1:
        return "mesh.sequence divides the queries"
    return None if width <= 128 else f"it takes at most 128 channels per head, and these have {width}"


def _cudnn(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    _index_BT: jax.Array,
    _segments: Segments,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention, by jax. implementation: xla, for tests.

    cuDNN wants keys and values of the same width, a multiple of 8. Channels of zeros change neither the scores nor the
    other channels of the result. Only the output is named for rematerialisation, not cuDNN's other residual. Under
    `remat: attention` the kernel's forward pass therefore runs again.
    """
    V = v_BSGV.shape[-1]
    width = 8 * -(-max(q_BTHK.shape[-1], V) // 8)
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),)) for x in (q_BTHK, k_BSGK, v_BSGV))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=implementation)
    return checkpoint_name(out[..., :V], SAVED)


def _per_device(
    attention: AttentionFunction, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask
) -> jax.Array:
    """Runs `attention` on each device for its own rows, queries and heads. Without a mesh, once for all of them."""
    index_BT, segments_BT = mask.index(q_BTHK.shape[1]), mask.segments_BT
    segments = None if segments_BT is None else (segments_BT, segments_BT)
    if not in_use():
        return attention(q_BTHK, k_BSGK, v_BSGV, index_BT, segments)
    rows, length, heads, _ = partition_spec(q_BTHK.shape, _QUERY_AXES)
    if heads:
        # Each device needs the kv heads of its own query heads. If there are fewer kv heads than shards, repeat them.
        G = k_BSGK.shape[2]
        copies = math.lcm(G, _shard_count(heads)) // G
        k_BSGK, v_BSGV = (jnp.repeat(x, copies, axis=2) for x in (k_BSGK, v_BSGV))
    query_spec, key_spec = PartitionSpec(rows, length, heads), PartitionSpec(rows, None, heads)
    index_spec = PartitionSpec(rows if len(index_BT) > 1 else None, length)
    segment_specs = None if segments is None else (PartitionSpec(rows, length), PartitionSpec(rows))
    in_specs = query_spec, key_spec, key_spec, index_spec, segment_specs
    run = jax.shard_map(attention, in_specs=in_specs, out_specs=query_spec, check_vma=False)
    return run(q_BTHK, k_BSGK, v_BSGV, index_BT, segments)


def _shard_count(axes: str | tuple[str, ...] | None) -> int:
    """The number of shards of a dimension that is sharded over these mesh axes."""
    return math.prod(axis_size(axis) for axis in ((axes,) if isinstance(axes, str) else axes or ()))
