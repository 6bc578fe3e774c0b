"""Causal attention by JAX's splash kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention).

Scores are float32 and never leave the chip's fast memory; blocks of keys that no query of a block may see are skipped.
The kernel knows nothing of a mesh: each device calls it for its own rows, heads and queries, over all keys.
"""

from typing import Any

import jax

from mythos_jax.ops.blockwise import pad_to_multiple

# Block sizes are multiples of the number of lanes of a vector register. The upper bound has not been tuned on a TPU.
_LANES = 128
_MAX_BLOCK = 512


def supports(T: int, S: int, n_shards: int = 1) -> bool:
    """Whether the kernel can attend from T queries to S keys, query t at key t, with the queries in n_shards shards.

    There must be at least 128 queries. If they are sharded, each shard must be a multiple of 128 long, because there
    can be no padding between shards. Head widths and numbers of heads are not restricted.
    """
    return T == S and T >= _LANES and (n_shards == 1 or T % (n_shards * _LANES) == 0)


def splash_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    scale: float,
    checkpoint_name: str,
    shard: tuple[jax.Array | int, int] = (0, 1),
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v, [B, T, H, V], where query t sees keys up to t. Can be differentiated once.

    segments: int32 segment ids of the queries [B, T] and of the keys [B, S]. checkpoint_name: the name that
    rematerialisation policies know the residuals by (the output and the logarithm of each softmax's sum). shard: (i, n)
    if q_BTHK is the i-th of n equal shards of the queries. interpret: run on a CPU, slowly, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    T, n_shards = q_BTHK.shape[1], shard[1]
    # Padding comes after the last query, so only padded queries can see padded keys.
    q, k, v = (pad_to_multiple(x, _LANES).swapaxes(1, 2) for x in (q_BTHK * scale, k_BSGK, v_BSGV))
    kernel = _shard_of_kernel(_kernel(q.shape[1], q.shape[2], n_shards, checkpoint_name, interpret), *shard)
    if segments is None:
        out_BHTV = jax.vmap(kernel)(q, k, v)
    else:
        segment_ids = kernels.SegmentIds(*(pad_to_multiple(x, _LANES) for x in segments))
        out_BHTV = jax.vmap(kernel)(q, k, v, segment_ids)
    return out_BHTV.swapaxes(1, 2)[:, :T]


def _kernel(n_heads: int, T: int, n_shards: int, checkpoint_name: str, interpret: bool) -> Any:
    """The kernel for T queries per shard; there are n_shards * T keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = max(n for n in range(_LANES, _MAX_BLOCK + 1, _LANES) if T % n == 0)
    block_sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((n_shards * T, n_shards * T))] * n_heads)
    return kernels.make_splash_mha(
        mask,
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=n_shards,
        residual_checkpoint_name=checkpoint_name,
        interpret=interpret,
    )


def _shard_of_kernel(kernel: Any, i: jax.Array | int, n_shards: int) -> Any:
    """The kernel with its tables (the blocks to visit, and the positions of the queries) reduced to shard i."""
    if n_shards == 1:
        return kernel

    def slice_table(table: jax.Array) -> jax.Array:
        # The positions of the queries are [T]; the other tables are [1, blocks of queries, blocks of keys].
        axis = 0 if table.ndim == 1 else 1
        size = table.shape[axis] // n_shards
        return jax.lax.dynamic_slice_in_dim(table, i * size, size, axis)

    return jax.tree.map(slice_table, kernel)
