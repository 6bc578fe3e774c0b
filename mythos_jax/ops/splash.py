"""Causal attention by JAX's splash kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention).

Scores never leave the chip's fast memory, and are float32; blocks of keys that no query of a block sees are skipped.
The kernel knows nothing of a mesh: each device calls it for its rows, heads and queries, over all keys.
"""

import jax

from mythos_jax.ops.blockwise import padded

# Blocks are multiples of the width of a register. Larger ones are not known to be faster: no TPU was at hand.
_WIDTH, _MOST = 128, 512


def takes(T: int, S: int, shards: int = 1) -> bool:
    """Whether the kernel is for T queries over S keys, query t at key t, the queries cut into so many parts.

    Not for fewer than 128 queries; and where they are cut, parts must be multiples of 128: there is no padding between
    them. Widths, and numbers of heads, may be any.
    """
    return T == S and T >= _WIDTH and (shards == 1 or T % (shards * _WIDTH) == 0)


def splash(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    scale: float,
    name: str,
    part: tuple[jax.Array | int, int] = (0, 1),
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v, [B, T, H, V], query t seeing keys up to t; differentiable once.

    segments: int32, of queries [B, T] and of keys [B, S]. name: what is kept for the backward pass beside the
    arguments (the result, the logarithm of each softmax's sum) is called, for rematerialisation. part: (i, n) where
    these are the i-th of n equal parts of the queries. interpret: run on a CPU, slowly, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    T, shards = q_BTHK.shape[1], part[1]
    # Behind the last query, where no query but those of the padding looks.
    q, k, v = (padded(x, _WIDTH).swapaxes(1, 2) for x in (q_BTHK * scale, k_BSGK, v_BSGV))
    kernel = _of_part(_kernel(q.shape[1], q.shape[2], shards, name, interpret), *part)
    if segments is None:
        out_BHTV = jax.vmap(kernel)(q, k, v)
    else:
        out_BHTV = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(*(padded(x, _WIDTH) for x in segments)))
    return out_BHTV.swapaxes(1, 2)[:, :T]


def _kernel(heads: int, T: int, shards: int, name: str, interpret: bool):
    """For T queries of each of so many parts; the keys are as many as all queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q = k = max(n for n in range(_WIDTH, _MOST + 1, _WIDTH) if T % n == 0)
    sizes = kernels.BlockSizes(
        block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k, block_q_dq=q, block_kv_dq=k
    )
    mask = masks.MultiHeadMask([masks.CausalMask((shards * T, shards * T))] * heads)
    return kernels.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=name,
        interpret=interpret,
    )


def _of_part(kernel, i: jax.Array | int, shards: int):
    """The kernel with its tables of which blocks to visit, and of where queries stand, cut to a part of the queries."""
    if shards == 1:
        return kernel

    def cut(table: jax.Array) -> jax.Array:
        axis = 0 if table.ndim == 1 else 1  # where queries stand is [T], the others are [1, blocks of queries, of keys]
        size = table.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(table, i * size, size, axis)

    return jax.tree.map(cut, kernel)
