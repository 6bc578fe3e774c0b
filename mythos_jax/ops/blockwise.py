"""Attention block by block with an online softmax (FlashAttention, arXiv 2205.14135), in plain array operations.

At any time only the scores of one block of queries against one block of keys exist. The backward pass recomputes them
from queries, keys and the logarithm of each softmax's sum. Blocks of keys that no query of a block may see are skipped.

Shape suffixes, besides those of `attention.py`: I blocks of q queries each, J blocks of C keys each. M = N q are the
queries of a block times the N query heads of one kv head. Rows and kv heads come before M, C and the widths, so that
every product is a batch of small matrix products and nothing is transposed inside the loops.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as name_residuals

# The default block size aims at this many scores over all rows and heads, 4 MiB. It was measured on a CPU
# (docs/speed.md): larger blocks do not fit its cache, and smaller ones are dominated by the overhead of each product.
_TARGET_SCORES = 2**20
# Bounds of the default number of queries, and of keys, per block.
_MIN_BLOCK, _MAX_BLOCK = 64, 512
# The score of a masked pair. It is finite, because a row that is masked entirely must not become NaN.
_MASKED = -1e30


class BlockMask(NamedTuple):
    """Which keys the queries of one block, or with a leading axis I of all blocks, may see.

    last_key: int32 [B or 1, q], the last key that each query may see; -1 for padding, which sees none. segments: int32
    segment ids [B, q], or None.
    """

    last_key: jax.Array
    segments: jax.Array | None


def blockwise_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    index_BT: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    scale: float,
    checkpoint_name: str,
    max_block: int | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v, [B, T, H, V], with softmax and sums in float32. Can be differentiated once.

    index_BT: int32, [1, T] if all rows have the same; a query sees keys up to its index. segments: int32 segment ids of
    the queries [B, T] and of the keys [B, S]; a query sees only keys of its own segment, and must see one.
    checkpoint_name: the name that rematerialisation policies know the residuals by (the output and the logarithm of
    each softmax's sum). max_block: the largest number of queries, and of keys, per block (default: depends on the
    number of rows and heads).
    """
    (B, T, H, _), S = q_BTHK.shape, k_BSGK.shape[1]
    if max_block is None:
        max_block = 1 << round(math.log2(max(1, _TARGET_SCORES / (B * H))) / 2)
        max_block = min(max(max_block, _MIN_BLOCK), _MAX_BLOCK)
    segments_BT, segments_BS = segments or (None, None)
    block_sizes = min(max_block, T), min(max_block, S)
    return _attention(q_BTHK, k_BSGK, v_BSGV, index_BT, segments_BT, segments_BS, scale, checkpoint_name, block_sizes)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    index_BT: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    scale: float,
    checkpoint_name: str,
    block_sizes: tuple[int, int],
) -> jax.Array:
    residuals = _forward(
        q_BTHK, k_BSGK, v_BSGV, index_BT, segments_BT, segments_BS, scale, checkpoint_name, block_sizes
    )
    return residuals[0]


_Residuals = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array, jax.Array
]  # the arguments up to segments_BS, out_BTHV, log_sum_IBGM


def _forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    index_BT: jax.Array,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    scale: float,
    checkpoint_name: str,
    block_sizes: tuple[int, int],
) -> tuple[jax.Array, _Residuals]:
    (_, T, H, _), (_, S, G, _) = q_BTHK.shape, k_BSGK.shape
    q, C = block_sizes
    keys_JBGCK, values_JBGCV = _key_blocks(k_BSGK, C), _key_blocks(v_BSGV, C)
    masks, segments_JBC = _block_masks(index_BT, segments_BT, segments_BS, S, q, C)

    def attend_from_block(_: None, block: tuple[jax.Array, BlockMask]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        query_BGMK, mask = block

        def attend_to_block(
            j: jax.Array | int, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            # The online softmax: running maximum, sum of exponentials and weighted sum of values. When the maximum
            # grows, the sums so far shrink by the same factor.
            old_max, total, out = state
            scores = _einsum("BGMK,BGCK->BGMC", query_BGMK, keys_JBGCK[j])
            scores = jnp.where(_allowed(mask, segments_JBC, j, C, H // G), scores, _MASKED)
            new_max = jnp.maximum(old_max, scores.max(-1))
            weights, shrink = jnp.exp(scores - new_max[..., None]), jnp.exp(old_max - new_max)
            new = _einsum("BGMC,BGCV->BGMV", weights.astype(values_JBGCV.dtype), values_JBGCV[j])
            return new_max, total * shrink + weights.sum(-1), out * shrink[..., None] + new

        shape_BGM, V = query_BGMK.shape[:-1], values_JBGCV.shape[-1]
        state = jnp.full(shape_BGM, _MASKED), jnp.zeros(shape_BGM), jnp.zeros((*shape_BGM, V))
        max_BGM, total_BGM, out_BGMV = _loop_over_visible_keys(mask, len(keys_JBGCK), C, attend_to_block, state)
        out_BGMV = (out_BGMV / total_BGM[..., None]).astype(values_JBGCV.dtype)
        return None, (out_BGMV, max_BGM + jnp.log(total_BGM))

    blocks = _query_blocks(q_BTHK * scale, G, q), masks
    _, (out_IBGMV, log_sum_IBGM) = jax.lax.scan(attend_from_block, None, blocks)
    out_BTHV, log_sum_IBGM = name_residuals((_from_query_blocks(out_IBGMV, T, H), log_sum_IBGM), checkpoint_name)
    return out_BTHV, (q_BTHK, k_BSGK, v_BSGV, index_BT, segments_BT, segments_BS, out_BTHV, log_sum_IBGM)


def _backward(
    scale: float, checkpoint_name: str, block_sizes: tuple[int, int], residuals: _Residuals, ct_BTHV: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    q_BTHK, k_BSGK, v_BSGV, index_BT, segments_BT, segments_BS, out_BTHV, log_sum_IBGM = residuals
    (_, T, H, _), (_, S, G, _) = q_BTHK.shape, k_BSGK.shape
    q, C = block_sizes
    keys_JBGCK, values_JBGCV = _key_blocks(k_BSGK, C), _key_blocks(v_BSGV, C)
    masks, segments_JBC = _block_masks(index_BT, segments_BT, segments_BS, S, q, C)
    # The gradient of the softmax subtracts from each query's score gradients their weighted mean, which is out · ct.
    mean_BTH1 = (out_BTHV.astype(jnp.float32) * ct_BTHV.astype(jnp.float32)).sum(-1, keepdims=True)

    def from_block(
        key_sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array, jax.Array, jax.Array, BlockMask]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        query_BGMK, ct_BGMV, mean_BGM1, log_sum_BGM, mask = block

        def to_block(
            j: jax.Array | int, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            d_keys, d_values, d_query = state
            scores = _einsum("BGMK,BGCK->BGMC", query_BGMK, keys_JBGCK[j])
            allowed = _allowed(mask, segments_JBC, j, C, H // G)
            weights = jnp.where(allowed, jnp.exp(scores - log_sum_BGM[..., None]), 0)
            d_scores = weights * (_einsum("BGMV,BGCV->BGMC", ct_BGMV, values_JBGCV[j]) - mean_BGM1)
            weights, d_scores = weights.astype(values_JBGCV.dtype), d_scores.astype(keys_JBGCK.dtype)
            # These sums have C last, so that XLA's CPU backend need not copy a block of scores to transpose it.
            d_keys = d_keys.at[j].add(_einsum("BGMK,BGMC->BGKC", query_BGMK, d_scores))
            d_values = d_values.at[j].add(_einsum("BGMV,BGMC->BGVC", ct_BGMV, weights))
            return d_keys, d_values, d_query + _einsum("BGMC,BGCK->BGMK", d_scores, keys_JBGCK[j])

        state = *key_sums, jnp.zeros(query_BGMK.shape)
        d_keys, d_values, d_query = _loop_over_visible_keys(mask, len(keys_JBGCK), C, to_block, state)
        return (d_keys, d_values), d_query

    query_IBGMK, ct_IBGMV, mean_IBGM1 = (_query_blocks(x, G, q) for x in (q_BTHK * scale, ct_BTHV, mean_BTH1))
    d_keys, d_values = (jnp.zeros((*x.shape[:3], x.shape[4], C)) for x in (keys_JBGCK, values_JBGCV))
    blocks = query_IBGMK, ct_IBGMV, mean_IBGM1, log_sum_IBGM, masks
    (d_keys, d_values), d_query = jax.lax.scan(from_block, (d_keys, d_values), blocks)
    d_q_BTHK = (_from_query_blocks(d_query, T, H) * scale).astype(q_BTHK.dtype)
    d_k_BSGK, d_v_BSGV = (_from_key_sums(x, S).astype(k_BSGK.dtype) for x in (d_keys, d_values))
    return d_q_BTHK, d_k_BSGK, d_v_BSGV, None, None, None


_attention.defvjp(_forward, _backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Accumulates in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def pad_to_multiple(x: jax.Array, multiple: int, fill: int = 0) -> jax.Array:
    """x with its second axis padded at the end to a multiple of `multiple`."""
    widths = [(0, 0), (0, -x.shape[1] % multiple), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=fill)


def _query_blocks(x_BTHK: jax.Array, G: int, q: int) -> jax.Array:
    """[B, T, H, K] as [I, B, G, M, K]."""
    B, _, H, K = x_BTHK.shape
    x_IBGNqK = pad_to_multiple(x_BTHK, q).reshape(B, -1, q, G, H // G, K).transpose(1, 0, 3, 4, 2, 5)
    return x_IBGNqK.reshape(-1, B, G, H // G * q, K)


def _from_query_blocks(x_IBGMK: jax.Array, T: int, H: int) -> jax.Array:
    """The inverse of `_query_blocks`: [B, T, H, K]."""
    n_blocks, B, G, _, K = x_IBGMK.shape
    x_BIqGNK = x_IBGMK.reshape(n_blocks, B, G, H // G, -1, K).transpose(1, 0, 4, 2, 3, 5)
    return x_BIqGNK.reshape(B, -1, H, K)[:, :T]


def _key_blocks(x_BSGK: jax.Array, C: int) -> jax.Array:
    """[B, S, G, K] as [J, B, G, C, K]."""
    B, _, G, K = x_BSGK.shape
    return pad_to_multiple(x_BSGK, C).reshape(B, -1, C, G, K).transpose(1, 0, 3, 2, 4)


def _from_key_sums(x_JBGKC: jax.Array, S: int) -> jax.Array:
    """Gradients by block of keys, with C last, as [B, S, G, K]."""
    J, B, G, K, C = x_JBGKC.shape
    return x_JBGKC.transpose(1, 0, 4, 2, 3).reshape(B, J * C, G, K)[:, :S]


def _block_masks(
    index_BT: jax.Array, segments_BT: jax.Array | None, segments_BS: jax.Array | None, S: int, q: int, C: int
) -> tuple[BlockMask, jax.Array | None]:
    """The masks of all blocks of queries, and the segment ids of all blocks of keys, [J, B, C].

    Padded queries see no keys. No query sees padded keys, because no index exceeds S - 1.
    """

    def split(x: jax.Array, size: int, fill: int) -> jax.Array:
        return pad_to_multiple(x, size, fill).reshape(len(x), -1, size).swapaxes(0, 1)

    last_key = split(jnp.minimum(index_BT, S - 1), q, -1)
    if segments_BT is None or segments_BS is None:
        return BlockMask(last_key, None), None
    return BlockMask(last_key, split(segments_BT, q, 0)), split(segments_BS, C, 0)


def _allowed(mask: BlockMask, segments_JBC: jax.Array | None, j: jax.Array | int, C: int, N: int) -> jax.Array:
    """Bool [B or 1, 1, M, C]: which keys of block j the queries of a block may see."""
    allowed = j * C + jnp.arange(C) <= mask.last_key[..., None]
    if mask.segments is not None and segments_JBC is not None:
        allowed &= mask.segments[..., None] == segments_JBC[j][:, None]
    return jnp.tile(allowed, (1, N, 1))[:, None]


def _loop_over_visible_keys(mask: BlockMask, n_blocks: int, C: int, step: Callable[..., Any], state: Any) -> Any:
    """step(j, state) for each block j of keys, up to the last one that a query of the block may see."""
    if n_blocks == 1:
        return step(0, state)
    return jax.lax.fori_loop(0, mask.last_key.max() // C + 1, step, state)
