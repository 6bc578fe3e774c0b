"""Scaled dot-product attention with grouped heads, in the form that suits the platform and the lengths."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mythos_jax.ops import splash
from mythos_jax.ops.blockwise import blockwise
from mythos_jax.sharding import axis_size, in_use, placement, platform

# What rematerialisation policies call the result of attention and all else that its backward pass needs kept.
SAVED = "attention"
# So few queries have few scores, whatever the number of keys: they are made whole.
FEW = 16

# Attention by one device: queries, keys, values, index, (segments of queries, of keys) or None.
Form = Callable[..., jax.Array]
_QUERIES = ("batch", "length", "heads", None)


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
    each device for its rows, heads and queries, over all keys: on a TPU by a kernel where no queries stand behind a
    cache and `splash.takes` their number; on a GPU by cuDNN's where `_for_cudnn`; in all other cases by `blockwise`.
    """
    if q_BTHK.shape[1] <= FEW:
        return checkpoint_name(whole(q_BTHK, k_BSGK, v_BSGV, mask, scale), SAVED)
    return _by_device(_form(q_BTHK, k_BSGK, v_BSGV, mask, scale), q_BTHK, k_BSGK, v_BSGV, mask)


def _form(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask, scale: float) -> Form:
    on, T, S = platform(), q_BTHK.shape[1], k_BSGK.shape[1]
    parts = _ways(placement(q_BTHK.shape, _QUERIES)[1]) if in_use() else 1
    if on == "tpu" and mask.index_BT is None and splash.takes(T, S, parts):

        def kernel(q_BTHK, k_BSGK, v_BSGV, _, segments):
            part = (jax.lax.axis_index("sequence"), parts) if parts > 1 else (0, 1)
            return splash.splash(q_BTHK, k_BSGK, v_BSGV, segments, scale, SAVED, part)

        return kernel
    if on in ("gpu", "cuda") and parts == 1 and _for_cudnn(q_BTHK, v_BSGV, mask):
        return partial(_cudnn, scale=scale)
    # On a CPU blocks are made to fit its cache; elsewhere they are as large as is of use.
    return partial(blockwise, scale=scale, name=SAVED, block=None if on == "cpu" else 512)


def _for_cudnn(q_BTHK: jax.Array, v_BSGV: jax.Array, mask: Mask) -> bool:
    """What every GPU that cuDNN has flash attention for takes: 16 bits, one segment, no cache, equal widths."""
    K, V = q_BTHK.shape[-1], v_BSGV.shape[-1]
    plain = mask.index_BT is None and mask.segments_BT is None
    return plain and q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and K == V and K <= 128 and K % 8 == 0


def _cudnn(q_BTHK, k_BSGK, v_BSGV, _index, _segments, scale: float) -> jax.Array:
    """Lowered for CUDA and never run: no GPU was at hand.

    Of what its backward pass needs only the result has a name: under remat `attention` the kernel runs forward again.
    """
    out = jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGV, scale=scale, is_causal=True, implementation="cudnn")
    return checkpoint_name(out, SAVED)


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


def _by_device(form: Form, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask: Mask) -> jax.Array:
    """Each device for its part of rows, queries and heads. On one device, all."""
    index_BT, segments = mask.index(q_BTHK.shape[1]), mask.segments_BT
    arguments = q_BTHK, k_BSGK, v_BSGV, index_BT, None if segments is None else (segments, segments)
    if not in_use():
        return form(*arguments)
    rows, length, heads, _ = placement(q_BTHK.shape, _QUERIES)
    if heads:  # each device takes the kv heads of its query heads: there must be as many parts of those
        G = k_BSGK.shape[2]
        copies = math.lcm(G, _ways(heads)) // G
        arguments = q_BTHK, *(jnp.repeat(x, copies, axis=2) for x in (k_BSGK, v_BSGV)), *arguments[3:]
    of_queries, of_keys = PartitionSpec(rows, length, heads), PartitionSpec(rows, None, heads)
    of_index = PartitionSpec(rows if len(index_BT) > 1 else None, length)
    of_segments = None if segments is None else (PartitionSpec(rows, length), PartitionSpec(rows))
    in_specs = of_queries, of_keys, of_keys, of_index, of_segments
    return jax.shard_map(form, in_specs=in_specs, out_specs=of_queries, check_vma=False)(*arguments)


def _ways(axes: str | tuple[str, ...] | None) -> int:
    return math.prod(axis_size(axis) for axis in ((axes,) if isinstance(axes, str) else axes or ()))
