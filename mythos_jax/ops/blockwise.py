"""Attention block by block with an online softmax (FlashAttention, arXiv 2205.14135), as plain array operations.

Never more scores than one block are held, nor kept: the backward pass makes them again from queries, keys and the
logarithm of each softmax's sum. Blocks of keys that no query of a block may see are not visited.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# A score that counts nothing, and still finite: a row of nothing else must not become NaN.
_NEVER = -1e30

# Shape suffixes here: R rows of work, one for each batch row and kv head; N query heads of a kv head; I blocks of
# Q = q queries, J blocks of C = c keys.


def blockwise(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    index_BT: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    scale: float,
    block: int,
    budget: int,
    name: str,
) -> jax.Array:
    """softmax(scale q k^T) v, [B, T, H, V]; differentiable once. Softmax and sums in float32.

    index_BT: int32, [1, T] where all rows are alike; a query sees keys up to its index. segments: int32 of queries
    [B, T] and of keys [B, S]; a query sees its own segment. block: the most queries, and keys, of a block. budget: the
    most scores held at a time, as long as one block of one kv head is below. name: of what is kept for the backward
    pass, for rematerialisation.
    """
    T, S, N = q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.shape[2] // k_BSGK.shape[2]
    c = min(block, S)
    q = max(1, min(block, T, budget // (N * c)))
    segment_q, segment_k = segments or (None, None)
    return _blockwise(q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, scale, (q, c, budget), name)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _blockwise(q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, scale, sizes, name):
    return _forward(q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, scale, sizes, name)[0]


def _forward(q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, scale, sizes, name):
    (B, T, _, _), (_, S, G, _) = q_BTHK.shape, k_BSGK.shape
    q, c, budget = sizes
    shared, own = _masks(index_BT, segment_q, segment_k, S, G, q, c)
    query, key, value = _query_blocks(q_BTHK * scale, G, q), _key_blocks(k_BSGK, c), _key_blocks(v_BSGV, c)

    def rows(query_RINQK, key_RJCK, value_RJCV, own):
        masks = own or shared

        def one_block(i):
            query, end = query_RINQK[:, i], _end(masks, i, c)
            R, NQ, _ = query.shape

            def step(j, state):
                old, total, out = state
                scores = jnp.where(_allowed(masks, i, j, NQ // q, c), _product("rqk,rck->rqc", query, key_RJCK[:, j]), _NEVER)
                top = jnp.maximum(old, scores.max(-1))
                weights, shrink = jnp.exp(scores - top[..., None]), jnp.exp(old - top)
                new = _product("rqc,rcv->rqv", weights.astype(value_RJCV.dtype), value_RJCV[:, j])
                return top, total * shrink + weights.sum(-1), out * shrink[..., None] + new

            start = (
                jnp.full((R, NQ), _NEVER),
                jnp.zeros((R, NQ)),
                jnp.zeros((R, NQ, value_RJCV.shape[-1])),
            )
            top, total, out = _loop(key_RJCK.shape[1], end, step, start)
            return (out / total[..., None]).astype(value_RJCV.dtype), top + jnp.log(total)

        return _each(query_RINQK.shape[1], one_block)

    out, lse = _over_rows(rows, budget, query.shape[2] * c, (query, key, value, own))
    out_BTHV = checkpoint_name(_from_query_blocks(out, B, T, q), name)
    lse = checkpoint_name(lse, name)
    return out_BTHV, (q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, out_BTHV, lse)


def _backward(scale, sizes, name, kept, ct_BTHV):
    q_BTHK, k_BSGK, v_BSGV, index_BT, segment_q, segment_k, out_BTHV, lse_RINQ = kept
    (B, T, _, _), (_, S, G, _) = q_BTHK.shape, k_BSGK.shape
    q, c, budget = sizes
    shared, own = _masks(index_BT, segment_q, segment_k, S, G, q, c)
    query, key, value = _query_blocks(q_BTHK * scale, G, q), _key_blocks(k_BSGK, c), _key_blocks(v_BSGV, c)
    ct_RINQV = _query_blocks(ct_BTHV, G, q)
    along = (out_BTHV.astype(jnp.float32) * ct_BTHV.astype(jnp.float32)).sum(-1, keepdims=True)
    along_RINQ = _query_blocks(along, G, q)[..., 0]

    def rows(query_RINQK, key_RJCK, value_RJCV, lse_RINQ, along_RINQ, ct_RINQV, own):
        masks, blocks = own or shared, key_RJCK.shape[1]
        dtype = query_RINQK.dtype

        def one_block(state, i):
            query, ct, lse, along = query_RINQK[:, i], ct_RINQV[:, i], lse_RINQ[:, i, :, None], along_RINQ[:, i, :, None]

            def step(j, state):
                d_key, d_value, d_query = state
                key, value = key_RJCK[:, j], value_RJCV[:, j]
                scores = _product("rqk,rck->rqc", query, key)
                allowed = _allowed(masks, i, j, query.shape[1] // q, c)
                weights = jnp.where(allowed, jnp.exp(scores - lse), 0)
                d_scores = (weights * (_product("rqv,rcv->rqc", ct, value) - along)).astype(dtype)
                # Sums over queries come out with keys last: so the CPU's products need no copy of a block.
                d_key = _add(d_key, j, _product("rqk,rqc->rkc", query, d_scores))
                d_value = _add(d_value, j, _product("rqv,rqc->rvc", ct, weights.astype(dtype)))
                return d_key, d_value, d_query + _product("rqc,rck->rqk", d_scores, key)

            *state, d_query = _loop(blocks, _end(masks, i, c), step, (*state, jnp.zeros(query.shape)))
            return tuple(state), d_query

        R, J, C, _ = key_RJCK.shape
        start = tuple(jnp.zeros((R, J, x.shape[-1], C)) for x in (key_RJCK, value_RJCV))
        if query_RINQK.shape[1] == 1:
            state, d_query = one_block(start, 0)
            return (d_query[:, None], *state)
        state, d_query = jax.lax.scan(one_block, start, jnp.arange(query_RINQK.shape[1]))
        return (d_query.swapaxes(0, 1), *state)

    arguments = query, key, value, lse_RINQ, along_RINQ, ct_RINQV, own
    d_query, d_key, d_value = _over_rows(rows, budget, query.shape[2] * c, arguments)

    def of_keys(x_RJKC):
        J, K = x_RJKC.shape[1:3]
        return x_RJKC.reshape(B, G, J, K, c).transpose(0, 2, 4, 1, 3).reshape(B, J * c, G, K)[:, :S]

    d_q_BTHK = _from_query_blocks(d_query * scale, B, T, q).astype(q_BTHK.dtype)
    return d_q_BTHK, of_keys(d_key).astype(k_BSGK.dtype), of_keys(d_value).astype(v_BSGV.dtype), None, None, None


_blockwise.defvjp(_forward, _backward)


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _pad(x, axis, multiple, fill=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=fill)


def _query_blocks(x_BTHK, G, q):
    """[R, I, N q, K]."""
    B, _, H, K = x_BTHK.shape
    x = _pad(x_BTHK, 1, q).reshape(B, -1, q, G, H // G, K)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(B * G, -1, H // G * q, K)


def _from_query_blocks(x_RINQV, B, T, q):
    R, I, NQ, V = x_RINQV.shape
    x = x_RINQV.reshape(B, R // B, I, NQ // q, q, V).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, I * q, R // B * (NQ // q), V)[:, :T]


def _key_blocks(x_BSGK, c):
    """[R, J, c, K]."""
    B, _, G, K = x_BSGK.shape
    return _pad(x_BSGK, 1, c).reshape(B, -1, c, G, K).transpose(0, 3, 1, 2, 4).reshape(B * G, -1, c, K)


def _masks(index_BT, segment_q, segment_k, S, G, q, c):
    """Of all rows of work alike, or (then the first is None) of each its own: index [R, I, q], segments alike and of
    keys [R, J, c]. Queries of the padding see nothing."""
    index = _pad(jnp.minimum(index_BT, S - 1), 1, q, -1).reshape(index_BT.shape[0], -1, q)
    if segment_q is None and len(index) == 1:
        return (index, None, None), None
    B = len(index) if segment_q is None else len(segment_q)
    index = jnp.repeat(jnp.broadcast_to(index, (B, *index.shape[1:])), G, axis=0)
    if segment_q is None:
        return None, (index, None, None)
    segments = (_pad(x, 1, n).reshape(B, -1, n) for x, n in ((segment_q, q), (segment_k, c)))
    return None, (index, *(jnp.repeat(x, G, axis=0) for x in segments))


def _allowed(masks, i, j, N, c):
    """Bool [R or 1, N q, c] for a block of queries and one of keys."""
    index, segment_q, segment_k = masks
    allowed = j * c + jnp.arange(c) <= index[:, i, :, None]
    if segment_q is not None:
        allowed &= segment_q[:, i, :, None] == segment_k[:, j, None, :]
    return jnp.tile(allowed, (1, N, 1))


def _end(masks, i, c):
    """How many blocks of keys the i-th block of queries looks at."""
    return masks[0][:, i].max() // c + 1


def _add(x, j, part):
    return part[:, None] if x.shape[1] == 1 else x.at[:, j].add(part)


def _loop(blocks, end, step, state):
    return step(0, state) if blocks == 1 else jax.lax.fori_loop(0, end, step, state)


def _each(count, function):
    """function(0), …, stacked along the second axis."""
    if count == 1:
        return jax.tree.map(lambda x: x[:, None], function(0))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), jax.lax.map(function, jnp.arange(count)))


def _over_rows(function, budget, scores, arguments):
    """function(*arguments), for so many rows of work at a time that the scores of a block fit the budget."""
    total = len(arguments[0])
    rows = max(r for r in range(1, total + 1) if total % r == 0 and (r == 1 or r * scores <= budget))
    if rows == total:
        return function(*arguments)
    cut = jax.tree.map(lambda x: x.reshape(total // rows, rows, *x.shape[1:]), arguments)
    return jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), jax.lax.map(lambda a: function(*a), cut))
