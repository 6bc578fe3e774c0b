"""Attention block by block with an online softmax (FlashAttention, arXiv 2205.14135), as plain array operations.

Never more scores than those of one block of queries and one of keys are held, and none are kept: the backward pass
makes them again from queries, keys and the logarithm of each softmax's sum. Blocks of keys that no query of a block may
see are not visited.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Scores held at a time, of all rows and heads. On a CPU 4 MiB of them are fastest by far: more leave the cache, and
# are fresh memory to the system; fewer are not worth starting a product for (docs/speed.md).
_SCORES = 2**20
_LEAST, _MOST = 64, 512  # queries, and keys, of a block
# A score that counts nothing, and still finite: a row of nothing else must not become NaN.
_NEVER = -1e30

# Shape suffixes here: I blocks of q queries, M = N q of them with the N query heads of a kv head; J blocks of c = C
# keys. Rows and kv heads stand before them, so that a product is one of many small matrices and copies nothing.


def blockwise(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    index_BT: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    scale: float,
    name: str,
    block: int | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v, [B, T, H, V]; differentiable once. Softmax and sums in float32.

    index_BT: int32, [1, T] where all rows are alike; a query sees keys up to its index. segments: int32, of queries
    [B, T] and of keys [B, S]; a query sees its own segment, and of that at least one key. name: what the two things
    kept for the backward pass beside the arguments are called, for rematerialisation. block: the most queries, and
    keys, of a block (default: by the number of rows and heads).
    """
    (B, T, H, _), S = q_BTHK.shape, k_BSGK.shape[1]
    if block is None:
        block = 1 << round(math.log2(max(1, _SCORES / (B * H))) / 2)
        block = min(max(block, _LEAST), _MOST)
    segment_q, segment_k = segments or (None, None)
    sizes = min(block, T), min(block, S)
    return _blockwise(q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, scale, name, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _blockwise(q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, scale, name, sizes):
    return _forward(q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, scale, name, sizes)[0]


def _forward(q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, scale, name, sizes):
    (_, T, H, _), G = q_BTHK.shape, k_BSGK.shape[2]
    q, c = sizes
    key, value = _key_blocks(k_BSGK, c), _key_blocks(v_BSGV, c)
    masks, segments = _masks(index_BT, segment_q, segment_k, k_BSGK.shape[1], q, c)

    def one_block(_, block):
        query_BGMK, mask = block

        def step(j, state):
            old, total, out = state
            scores = _product("BGMK,BGCK->BGMC", query_BGMK, key[j])
            scores = jnp.where(_allowed(mask, segments, j, c, H // G), scores, _NEVER)
            top = jnp.maximum(old, scores.max(-1))
            weights, shrink = jnp.exp(scores - top[..., None]), jnp.exp(old - top)
            new = _product("BGMC,BGCV->BGMV", weights.astype(value.dtype), value[j])
            return top, total * shrink + weights.sum(-1), out * shrink[..., None] + new

        start = jnp.full(query_BGMK.shape[:-1], _NEVER), jnp.zeros(query_BGMK.shape[:-1])
        start = *start, jnp.zeros((*query_BGMK.shape[:-1], value.shape[-1]))
        top, total, out = _visit(mask, key.shape[0], c, step, start)
        return None, ((out / total[..., None]).astype(value.dtype), top + jnp.log(total))

    _, (out, lse_IBGM) = jax.lax.scan(one_block, None, (_query_blocks(q_BTHK * scale, G, q), masks))
    out_BTHV, lse_IBGM = checkpoint_name((_from_query_blocks(out, T, H), lse_IBGM), name)
    return out_BTHV, (q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, out_BTHV, lse_IBGM)


def _backward(scale, name, sizes, kept, ct_BTHV):
    q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, out_BTHV, lse_IBGM = kept
    (_, T, H, _), (_, S, G, _) = q_BTHK.shape, k_BSGK.shape
    q, c = sizes
    key, value = _key_blocks(k_BSGK, c), _key_blocks(v_BSGV, c)
    masks, segments = _masks(index_BT, segment_q, segment_k, S, q, c)
    along_BTH1 = (out_BTHV.astype(jnp.float32) * ct_BTHV.astype(jnp.float32)).sum(-1, keepdims=True)

    def one_block(sums, block):
        query_BGMK, ct_BGMV, along_BGM1, lse_BGM, mask = block

        def step(j, state):
            d_key, d_value, d_query = state
            scores = _product("BGMK,BGCK->BGMC", query_BGMK, key[j])
            weights = jnp.where(_allowed(mask, segments, j, c, H // G), jnp.exp(scores - lse_BGM[..., None]), 0)
            d_scores = weights * (_product("BGMV,BGCV->BGMC", ct_BGMV, value[j]) - along_BGM1)
            weights, d_scores = weights.astype(value.dtype), d_scores.astype(key.dtype)
            # Keys last in the sums over queries: so a CPU's product copies no block of scores.
            d_key = d_key.at[j].add(_product("BGMK,BGMC->BGKC", query_BGMK, d_scores))
            d_value = d_value.at[j].add(_product("BGMV,BGMC->BGVC", ct_BGMV, weights))
            return d_key, d_value, d_query + _product("BGMC,BGCK->BGMK", d_scores, key[j])

        *sums, d_query = _visit(mask, key.shape[0], c, step, (*sums, jnp.zeros(query_BGMK.shape)))
        return tuple(sums), d_query

    blocks = (_query_blocks(x, G, q) for x in (q_BTHK * scale, ct_BTHV, along_BTH1))
    sums = tuple(jnp.zeros((*x.shape[:3], x.shape[4], c)) for x in (key, value))
    (d_key, d_value), d_query = jax.lax.scan(one_block, sums, (*blocks, lse_IBGM, masks))
    d_q_BTHK = (_from_query_blocks(d_query, T, H) * scale).astype(q_BTHK.dtype)
    d_k_BSGK, d_v_BSGV = (_from_key_sums(x, S).astype(k_BSGK.dtype) for x in (d_key, d_value))
    return d_q_BTHK, d_k_BSGK, d_v_BSGV, None, None, None


_blockwise.defvjp(_forward, _backward)


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def padded(x: jax.Array, multiple: int, fill: int = 0) -> jax.Array:
    """The second axis, to a multiple."""
    widths = [(0, 0), (0, -x.shape[1] % multiple), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=fill)


def _query_blocks(x_BTHK, G, q):
    """[I, B, G, N q, K]."""
    B, _, H, K = x_BTHK.shape
    x = padded(x_BTHK, q).reshape(B, -1, q, G, H // G, K).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(-1, B, G, H // G * q, K)


def _from_query_blocks(x_IBGMK, T, H):
    blocks, B, G, _, K = x_IBGMK.shape
    x = x_IBGMK.reshape(blocks, B, G, H // G, -1, K).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, H, K)[:, :T]


def _key_blocks(x_BSGK, c):
    """[J, B, G, c, K]."""
    B, _, G, K = x_BSGK.shape
    return padded(x_BSGK, c).reshape(B, -1, c, G, K).transpose(1, 0, 3, 2, 4)


def _from_key_sums(x_JBGKC, S):
    J, B, G, K, c = x_JBGKC.shape
    return x_JBGKC.transpose(1, 0, 4, 2, 3).reshape(B, J * c, G, K)[:, :S]


def _masks(index_BT, segment_q, segment_k, S, q, c):
    """By block: (index [I, B or 1, q], segments of queries [I, B, q] or None), segments of keys [J, B, c] or None.

    Queries of the padding see nothing, and no query sees keys of the padding.
    """

    def cut(x, size, fill):
        return padded(x, size, fill).reshape(len(x), -1, size).swapaxes(0, 1)

    index = cut(jnp.minimum(index_BT, S - 1), q, -1)
    if segment_q is None:
        return (index, None), None
    return (index, cut(segment_q, q, 0)), cut(segment_k, c, 0)


def _allowed(mask, segments, j, c, N):
    """Bool [B or 1, 1, N q, c] for a block of queries and the j-th of keys."""
    index, segment_q = mask
    allowed = j * c + jnp.arange(c) <= index[..., None]
    if segment_q is not None:
        allowed &= segment_q[..., None] == segments[j][:, None]
    return jnp.tile(allowed, (1, N, 1))[:, None]


def _visit(mask, blocks, c, step, state):
    """Step by step over the blocks of keys, up to the last one that a query of the block sees."""
    return step(0, state) if blocks == 1 else jax.lax.fori_loop(0, mask[0].max() // c + 1, step, state)
