"""Routed experts on a mesh: no token is dropped, and no expert's weights travel along the `expert` axis.

A ring of experts, after MaxText: inside a fully manual `shard_map` each device gathers the tokens of its expert group,
applies the experts it holds, and the group's sums are scattered back. Or, by `all_to_all`, each device sends a token
only to the devices of the experts that it chose. Tokens go through in chunks, so that buffers stay bounded, and each
device multiplies as many rows as were sent to its experts, rounded up.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.ops.blocked_experts import blocked_experts
from mythos_jax.ops.exchange import exchange
from mythos_jax.ops.grouped_matmul import ExpertWeights, grouped_matmul
from mythos_jax.sharding import axis_size, constrain, in_use, mesh_axes, placement, platform

# Tokens gathered at a time: so many that an expert has this many rows on average, which keeps a chip's matrix units
# busy rather than its memory.
ROWS_PER_EXPERT = 512
# Rows multiplied at a time, over what a device gets when the load is even. Devices with more go round again.
SLACK = 1.25


def choose_experts(scores_BTE: jax.Array, k: int) -> jax.Array:
    """The k best-scored experts of each token, int32 [B, T, k]; on a mesh each device sorts its own tokens only."""
    if not in_use():
        return jax.lax.top_k(scores_BTE, k)[1]
    spec = placement(scores_BTE.shape, ("batch", "length", None))
    scores_BTE = jax.lax.stop_gradient(scores_BTE)
    return jax.shard_map(lambda scores: jax.lax.top_k(scores, k)[1], in_specs=spec, out_specs=spec)(scores_BTE)


def experts_on_mesh(
    x_BTD: jax.Array,
    gates_BTK: jax.Array,
    experts_BTK: jax.Array,
    weights: ExpertWeights,
    width: str = "embed",
    way: str = "ring",
) -> jax.Array:
    """Each token's chosen experts, weighted by its gates, [B, T, D], on the mesh in use.

    gates_BTK: float32, experts_BTK: int32. width: logical name of the weights' axis D; where the mesh cuts it the
    weights are gathered here, and their gradients scattered. way: `ring` or `all_to_all`.
    """
    token_spec = placement(x_BTD.shape, ("batch", "length", "act_embed"))
    token_axes = mesh_axes(token_spec)
    specs = [placement(w.shape, n) for w, n in zip(weights, _names(width), strict=True)]
    if not mesh_axes(specs[0][1:2]) <= token_axes:  # a batch that the mesh does not divide
        weights = tuple(constrain(w, *n) for w, n in zip(weights, _names("act_embed"), strict=True))
        specs = [placement(w.shape, n) for w, n in zip(weights, _names("act_embed"), strict=True)]
    width_axes, axes = mesh_axes(specs[0][1:2]), token_axes | mesh_axes(specs[0])
    ways = axis_size("expert") if specs[0][0] else 1
    gathers = ways > 1 and "expert" in token_axes
    n_experts, K = weights[0].shape[0], experts_BTK.shape[-1]

    def region(x_BTD: jax.Array, gates_BTK: jax.Array, experts_BTK: jax.Array, *weights: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        if width_axes:
            weights = [_fenced(w) for w in weights]
        for axis in width_axes:
            weights = [jax.lax.all_gather(w, axis, axis=i, tiled=True) for w, i in zip(weights, (1, 1, 2), strict=True)]
        first = jax.lax.axis_index("expert") * (n_experts // ways) if ways > 1 else 0
        wanted = max(ROWS_PER_EXPERT * n_experts // K // (ways if gathers else 1), 1)
        n_chunks = -(-B * T // wanted)
        size = -(-B * T // n_chunks)
        gathered = size * (ways if gathers else 1)
        # The most that can come, when every token chooses as many experts of this device as it can.
        most = gathered * min(K, n_experts // ways)
        rows = most if ways == 1 else min(most, 8 * math.ceil(SLACK * gathered * K / ways / 8))

        @jax.checkpoint
        def chunk(tokens: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            if gathers and way == "all_to_all":
                return _sent_experts(rows, n_experts, *tokens, *weights)
            if gathers:
                tokens = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), tokens)
            x_ND, gates_NK, experts_NK = tokens
            y_ND = _local_experts(rows, x_ND, gates_NK, experts_NK - first, *weights)
            return jax.lax.psum_scatter(y_ND, "expert", tiled=True) if gathers else y_ND

        def cut(a: jax.Array, fill: int = 0) -> jax.Array:
            a = jnp.pad(a.reshape(B * T, -1), ((0, n_chunks * size - B * T), (0, 0)), constant_values=fill)
            return a.reshape(n_chunks, size, -1)

        # Padding goes to an expert that no device has.
        tokens = cut(x_BTD), cut(gates_BTK), cut(experts_BTK, n_experts)
        y = jax.lax.map(chunk, tokens) if n_chunks > 1 else chunk(jax.tree.map(lambda a: a[0], tokens))
        # Devices with the same tokens have other experts, or other parts of the hidden width.
        y = _sum(tuple(sorted(axes - token_axes)), y)
        return y.reshape(-1, D)[: B * T].reshape(B, T, D)

    # Unchecked: the TPU kernel does not say along which axes its result differs.
    run = jax.shard_map(region, in_specs=(*[token_spec] * 3, *specs), out_specs=token_spec, check_vma=False)
    return run(x_BTD, gates_BTK, experts_BTK, *weights)


def _names(width: str) -> tuple[tuple[str, str, str], ...]:
    return ("expert", width, "mlp"), ("expert", width, "mlp"), ("expert", "mlp", width)


@jax.custom_vjp
def _fenced(w: jax.Array) -> jax.Array:
    """w, whose gradient stays where it is made. The compiler's pass that moves sums over devices out of loops takes a
    scattered sum that is then cast for one it can move, and ends in an internal error (libtpu 0.0.42.1)."""
    return w


_fenced.defvjp(lambda w: (w, None), lambda _, ct: (jax.lax.optimization_barrier(ct),))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    """The sum over devices along these axes, which all of them get and hand out of the region as one value.

    Unchecked, `shard_map` gives each of them its part, 1 / n, of that value's gradient; the whole of it is the same
    everywhere, so that nothing has to be sent.
    """
    return jax.lax.psum(x, axes)


_sum.defvjp(lambda axes, x: (_sum(axes, x), None), lambda axes, _, ct: (ct * math.prod(map(axis_size, axes)),))


def _sent_experts(
    rows: int, n_experts: int, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array, *weights: jax.Array
) -> jax.Array:
    """The sum over a token's experts wherever they are: a copy of the token goes to each and its result comes back."""
    (N, K), ours = experts_NK.shape, weights[0].shape[0]
    ways = n_experts // ours
    order = jnp.argsort(experts_NK.reshape(-1), stable=True)  # so by device too
    sizes_E = jnp.bincount(experts_NK.reshape(-1), length=n_experts + 1)[:n_experts].astype(jnp.int32)
    sizes_SRE = jax.lax.all_gather(sizes_E, "expert").reshape(ways, ways, ours)  # sender, receiver, its experts
    sizes_SR = sizes_SRE.sum(-1)
    most = ways * N * min(K, ours)
    copies = exchange("expert", most, x_ND[order // K], sizes_SR)
    # They come ordered by sender and expert; behind them is nothing.
    ends = jnp.cumsum(sizes_SRE[:, jax.lax.axis_index("expert")].reshape(-1))
    place = jnp.searchsorted(ends, jnp.arange(most), side="right")
    experts = jnp.where(place < ways * ours, place % ours, ours)
    out = _local_experts(rows, copies, jnp.ones((most, 1)), experts[:, None], *weights)
    out = exchange("expert", N * K, out, sizes_SR.T).astype(jnp.float32) * gates_NK.reshape(-1)[order][:, None]
    return jnp.zeros(x_ND.shape, jnp.float32).at[order // K].add(out).astype(x_ND.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_experts(
    rows: int, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array, *weights: jax.Array
) -> jax.Array:
    """The sum over a token's experts among this device's, 0 … E - 1; others are passed over."""

    def add(y_ND: jax.Array, choice_R: jax.Array, token_R: jax.Array, sizes_E: jax.Array, real_R: jax.Array):
        out_RD = _feed_forward(x_ND[token_R], gates_NK.reshape(-1)[choice_R], weights, sizes_E, real_R)
        return y_ND.at[token_R].add(jnp.where(real_R[:, None], out_RD, 0).astype(jnp.float32))

    y_ND = _rounds(rows, experts_NK, weights[0].shape[0], add, _zeros(x_ND))
    return y_ND.astype(x_ND.dtype)


def _forward(rows: int, *arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _local_experts(rows, *arguments), arguments


def _backward(rows: int, kept: tuple[jax.Array, ...], dy_ND: jax.Array) -> tuple[jax.Array | None, ...]:
    x_ND, gates_NK, experts_NK, *weights = kept

    def add(sums: Any, choice_R: jax.Array, token_R: jax.Array, sizes_E: jax.Array, real_R: jax.Array):
        dx_ND, dgates, dweights = sums

        def run(x_RD, gates_R, *weights):
            return _feed_forward(x_RD, gates_R, weights, sizes_E, real_R)

        _, pull = jax.vjp(run, x_ND[token_R], gates_NK.reshape(-1)[choice_R], *weights)
        dx_RD, dgates_R, *new = pull(jnp.where(real_R[:, None], dy_ND[token_R], 0))
        return (
            dx_ND.at[token_R].add(jnp.where(real_R[:, None], dx_RD, 0).astype(jnp.float32)),
            dgates.at[choice_R].add(jnp.where(real_R, dgates_R, 0)),
            [total + dw.astype(jnp.float32) for total, dw in zip(dweights, new, strict=True)],
        )

    sums = _zeros(x_ND), _zeros(gates_NK.reshape(-1)), [_zeros(w) for w in weights]
    dx_ND, dgates, dweights = _rounds(rows, experts_NK, weights[0].shape[0], add, sums)
    dweights = [dw.astype(w.dtype) for dw, w in zip(dweights, weights, strict=True)]
    return dx_ND.astype(x_ND.dtype), dgates.reshape(gates_NK.shape), None, *dweights


_local_experts.defvjp(_forward, _backward)


def _rounds(rows: int, experts_NK: jax.Array, n_experts: int, add: Callable[..., Any], sums: Any) -> Any:
    """Sorts (token, choice) pairs by expert and adds `rows` of them at a time to `sums`, until none is left.

    add(sums, choice_R, token_R, sizes_E, real_R): indices into all choices and into tokens, rows of each expert, and
    which rows there really are.
    """
    N, K = experts_NK.shape
    experts = experts_NK.reshape(-1)
    experts = jnp.where((experts >= 0) & (experts < n_experts), experts, n_experts)
    order = jnp.pad(jnp.argsort(experts, stable=True), (0, rows))
    ends_E = jnp.cumsum(jnp.bincount(experts, length=n_experts + 1)[:n_experts])

    def step(i: jax.Array | int, sums: Any) -> Any:
        choice_R = jax.lax.dynamic_slice_in_dim(order, i * rows, rows)
        sizes_E = jnp.diff(jnp.clip(ends_E - i * rows, 0, rows), prepend=0).astype(jnp.int32)
        return add(sums, choice_R, choice_R // K, sizes_E, i * rows + jnp.arange(rows) < ends_E[-1])

    if rows >= N * min(K, n_experts):
        return step(0, sums)
    return jax.lax.fori_loop(0, -(-ends_E[-1] // rows), step, sums)


def _feed_forward(
    x_RD: jax.Array, gates_R: jax.Array, weights: tuple[jax.Array, ...], sizes_E: jax.Array, real_R: jax.Array
) -> jax.Array:
    """SwiGLU of each row by its expert, times its gate. Of rows that are not real nothing is to be used."""
    if platform() == "cpu":
        experts_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x_RD)), side="right")
        return blocked_experts(x_RD, gates_R[:, None], experts_R[:, None], weights)
    gate, up, down = weights
    pre, value = (jnp.where(real_R[:, None], grouped_matmul(x_RD, w, sizes_E), 0) for w in (gate, up))
    hidden = nn.silu(pre) * value * gates_R[:, None].astype(x_RD.dtype)
    return grouped_matmul(hidden, down, sizes_E)


def _zeros(x: jax.Array) -> jax.Array:
    """Float32 zeros to add to, of the shape of x."""
    return jnp.zeros(x.shape, jnp.float32)
