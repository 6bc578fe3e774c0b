"""Routed experts on a mesh: no token is dropped, and no expert's weights move along the `expert` axis.

Two ways of bringing tokens and experts together, both inside a fully manual `shard_map`:

- `ring` (as in MaxText): each device gathers the tokens of its expert group, applies the experts it holds, and the
  group's sums are reduce-scattered back.
- `all_to_all`: each device sends a token only to the devices that hold the experts it chose.

Tokens are processed in chunks, which bounds the buffers. Each device multiplies as many rows as were sent to its
experts, rounded up.

Shape suffixes: N tokens of one device and chunk, K choices per token, E experts, R rows multiplied at a time, S sending
and R receiving devices in [S, R], D model width, F hidden width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mythos_jax.ops.blocked_experts import blocked_experts
from mythos_jax.ops.expectations import expect_rows, expect_trips
from mythos_jax.ops.grouped_matmul import ExpertWeights, grouped_matmul
from mythos_jax.ops.ragged_all_to_all import ragged_all_to_all
from mythos_jax.sharding import axis_size, constrain, in_use, mesh_axes, partition_spec, platform

# The size of a chunk of tokens: an expert gets this many rows on average, which is enough for a chip to be limited by
# its matrix units and not by reading the weights.
ROWS_PER_EXPERT = 512
# Rows multiplied at a time, relative to what a device gets under an even load. Devices with more rows loop.
SLACK = 1.25


def choose_experts(scores_BTE: jax.Array, k: int) -> jax.Array:
    """The k experts with the highest scores for each token, int32 [B, T, k]. Each device sorts only its own tokens."""
    if not in_use():
        return jax.lax.top_k(scores_BTE, k)[1]
    spec = partition_spec(scores_BTE.shape, ("batch", "length", None))
    scores_BTE = jax.lax.stop_gradient(scores_BTE)
    return jax.shard_map(lambda scores: jax.lax.top_k(scores, k)[1], in_specs=spec, out_specs=spec)(scores_BTE)


class _Layout(NamedTuple):
    """How the mesh in use places tokens and experts.

    tokens: spec of [B, T, ...]. weights: specs of gate, up and down. width_axes: mesh axes that shard the weights' axis
    D, along which each device gathers them. sum_axes: mesh axes along which devices have the same tokens but other
    experts or other parts of the hidden width, so that their results must be added. expert_shards: how many devices
    along `expert` the experts are divided over. token_shards: how many of those have different tokens.
    """

    tokens: PartitionSpec
    weights: tuple[PartitionSpec, ...]
    width_axes: set[str]
    sum_axes: tuple[str, ...]
    expert_shards: int
    token_shards: int


def experts_on_mesh(
    x_BTD: jax.Array,
    gates_BTK: jax.Array,
    experts_BTK: jax.Array,
    weights: ExpertWeights,
    width_name: str = "embed",
    exchange: str = "ring",
) -> jax.Array:
    """Each token's chosen experts, weighted by its gates, [B, T, D], on the mesh in use.

    gates_BTK: float32. experts_BTK: int32. width_name: logical name of the weights' axis D; if the mesh shards it, the
    weights are gathered along it here, and their gradients are scattered. exchange: `ring` or `all_to_all`.
    """
    layout = _layout(x_BTD, weights, width_name)
    if not layout.width_axes <= mesh_axes(layout.tokens):
        # The mesh does not divide the batch, so devices along some of these axes have the same tokens. If they gathered
        # the weights in the region, they would compute the same result, and the sum over devices would count it several
        # times. Gather the weights before the region instead.
        width_name = "act_embed"
        gate, up, down = (constrain(w, *names) for w, names in zip(weights, _weight_axes(width_name), strict=True))
        weights = gate, up, down
        layout = _layout(x_BTD, weights, width_name)
    # Unchecked, because the TPU kernel does not declare along which axes its result differs.
    run = jax.shard_map(
        partial(_on_device, layout, exchange),
        in_specs=(*[layout.tokens] * 3, *layout.weights),
        out_specs=layout.tokens,
        check_vma=False,
    )
    return run(x_BTD, gates_BTK, experts_BTK, *weights)


def _weight_axes(width_name: str) -> tuple[tuple[str, str, str], ...]:
    """Logical axis names of gate, up and down."""
    return ("expert", width_name, "mlp"), ("expert", width_name, "mlp"), ("expert", "mlp", width_name)


def _layout(x_BTD: jax.Array, weights: ExpertWeights, width_name: str) -> _Layout:
    tokens = partition_spec(x_BTD.shape, ("batch", "length", "act_embed"))
    specs = tuple(partition_spec(w.shape, names) for w, names in zip(weights, _weight_axes(width_name), strict=True))
    token_axes = mesh_axes(tokens)
    expert_shards = axis_size("expert") if specs[0][0] else 1
    return _Layout(
        tokens=tokens,
        weights=specs,
        width_axes=mesh_axes(specs[0][1:2]),
        sum_axes=tuple(sorted(mesh_axes(specs[0]) - token_axes)),
        expert_shards=expert_shards,
        token_shards=expert_shards if "expert" in token_axes else 1,
    )


def _on_device(
    layout: _Layout,
    exchange: str,
    x_BTD: jax.Array,
    gates_BTK: jax.Array,
    experts_BTK: jax.Array,
    *weights: jax.Array,
) -> jax.Array:
    """The part of one device; all arrays are its shards."""
    (B, T, D), K = x_BTD.shape, experts_BTK.shape[-1]
    n_local = weights[0].shape[0]
    n_experts = n_local * layout.expert_shards
    if layout.width_axes:
        weights = tuple(_keep_gradient_here(w) for w in weights)
    for axis in layout.width_axes:
        weights = tuple(
            jax.lax.all_gather(w, axis, axis=i, tiled=True) for w, i in zip(weights, (1, 1, 2), strict=True)
        )
    first_expert = jax.lax.axis_index("expert") * n_local if layout.expert_shards > 1 else 0
    n_chunks = -(-B * T // max(ROWS_PER_EXPERT * n_experts // K // layout.token_shards, 1))
    chunk_size = -(-B * T // n_chunks)
    # n_tokens may choose this device's experts. max_rows come if each of them chooses as many of these as possible.
    n_tokens = chunk_size * layout.token_shards
    even_rows = n_tokens * K // layout.expert_shards
    max_rows = n_tokens * min(K, n_local)
    rows = max_rows
    if layout.expert_shards > 1:
        rows = min(max_rows, 8 * math.ceil(SLACK * n_tokens * K / layout.expert_shards / 8))

    @jax.checkpoint
    def run_chunk(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        if layout.token_shards > 1 and exchange == "all_to_all":
            with expect_rows(even_rows):
                return _exchanged_experts(rows, n_experts, *chunk, *weights)
        if layout.token_shards > 1:
            chunk = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), chunk)
        x_ND, gates_NK, experts_NK = chunk
        with expect_rows(even_rows):
            y_ND = _local_experts(rows, x_ND, gates_NK, experts_NK - first_expert, *weights)
        return jax.lax.psum_scatter(y_ND, "expert", tiled=True) if layout.token_shards > 1 else y_ND

    def split(a: jax.Array, fill: int = 0) -> jax.Array:
        a = jnp.pad(a.reshape(B * T, -1), ((0, n_chunks * chunk_size - B * T), (0, 0)), constant_values=fill)
        return a.reshape(n_chunks, chunk_size, -1)

    # Padding is assigned to an expert that no device has.
    chunks = split(x_BTD), split(gates_BTK), split(experts_BTK, n_experts)
    y = jax.lax.map(run_chunk, chunks) if n_chunks > 1 else run_chunk(jax.tree.map(lambda a: a[0], chunks))
    y = _sum_over_devices(layout.sum_axes, y)
    return y.reshape(-1, D)[: B * T].reshape(B, T, D)


@jax.custom_vjp
def _keep_gradient_here(w: jax.Array) -> jax.Array:
    """w; the compiler may not move its gradient.

    XLA's pass that moves sums over devices out of loops mistakes a scattered sum that is then cast for one it can move,
    and ends in an internal error (libtpu 0.0.42.1).
    """
    return w


_keep_gradient_here.defvjp(lambda w: (w, None), lambda _, ct: (jax.lax.optimization_barrier(ct),))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_devices(axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    """The sum over devices along these axes, which all of them return from the region as one replicated value.

    With check_vma=False, `shard_map` splits the cotangent of a replicated output into equal parts, 1 / n each. The full
    cotangent is the same on every device, so it is restored by scaling, without communication.
    """
    return jax.lax.psum(x, axes)


_sum_over_devices.defvjp(
    lambda axes, x: (_sum_over_devices(axes, x), None),
    lambda axes, _, ct: (ct * math.prod(map(axis_size, axes)),),
)


def _exchanged_experts(
    rows: int, n_experts: int, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array, *weights: jax.Array
) -> jax.Array:
    """Sum over each token's experts on any device: a copy of the token goes to each expert, and its result returns."""
    (N, K), n_local = experts_NK.shape, weights[0].shape[0]
    n_devices = n_experts // n_local
    order = jnp.argsort(experts_NK.reshape(-1), stable=True)  # by expert, and therefore also by device
    sizes_E = jnp.bincount(experts_NK.reshape(-1), length=n_experts + 1)[:n_experts].astype(jnp.int32)
    sizes_SRE = jax.lax.all_gather(sizes_E, "expert").reshape(n_devices, n_devices, n_local)  # E: the receiver's own
    sizes_SR = sizes_SRE.sum(-1)
    max_rows = n_devices * N * min(K, n_local)
    received = ragged_all_to_all("expert", max_rows, x_ND[order // K], sizes_SR)
    # Rows arrive ordered by sender, then by expert. Behind them are zeros, which are given to no expert.
    ends = jnp.cumsum(sizes_SRE[:, jax.lax.axis_index("expert")].reshape(-1))
    group = jnp.searchsorted(ends, jnp.arange(max_rows), side="right")
    experts = jnp.where(group < n_devices * n_local, group % n_local, n_local)
    out = _local_experts(rows, received, jnp.ones((max_rows, 1)), experts[:, None], *weights)
    returned = ragged_all_to_all("expert", N * K, out, sizes_SR.T).astype(jnp.float32)
    weighted = returned * gates_NK.reshape(-1)[order][:, None]
    return jnp.zeros(x_ND.shape, jnp.float32).at[order // K].add(weighted).astype(x_ND.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_experts(
    rows: int, x_ND: jax.Array, gates_NK: jax.Array, experts_NK: jax.Array, *weights: jax.Array
) -> jax.Array:
    """Sum over each token's experts among this device's, 0 … E - 1; other experts contribute nothing."""

    def add(
        y_ND: jax.Array, choice_R: jax.Array, token_R: jax.Array, sizes_E: jax.Array, is_real_R: jax.Array
    ) -> jax.Array:
        out_RD = _feed_forward(x_ND[token_R], gates_NK.reshape(-1)[choice_R], weights, sizes_E, is_real_R)
        return y_ND.at[token_R].add(jnp.where(is_real_R[:, None], out_RD, 0).astype(jnp.float32))

    y_ND = _accumulate(rows, experts_NK, weights[0].shape[0], add, _float32_zeros(x_ND))
    return y_ND.astype(x_ND.dtype)


def _forward(rows: int, *arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _local_experts(rows, *arguments), arguments


def _backward(rows: int, residuals: tuple[jax.Array, ...], dy_ND: jax.Array) -> tuple[jax.Array | None, ...]:
    x_ND, gates_NK, experts_NK, *weights = residuals

    def add(sums: Any, choice_R: jax.Array, token_R: jax.Array, sizes_E: jax.Array, is_real_R: jax.Array) -> Any:
        dx_ND, dgates, dweights = sums

        def run(x_RD: jax.Array, gates_R: jax.Array, *weights: jax.Array) -> jax.Array:
            return _feed_forward(x_RD, gates_R, weights, sizes_E, is_real_R)

        _, vjp = jax.vjp(run, x_ND[token_R], gates_NK.reshape(-1)[choice_R], *weights)
        dx_RD, dgates_R, *new = vjp(jnp.where(is_real_R[:, None], dy_ND[token_R], 0))
        return (
            dx_ND.at[token_R].add(jnp.where(is_real_R[:, None], dx_RD, 0).astype(jnp.float32)),
            dgates.at[choice_R].add(jnp.where(is_real_R, dgates_R, 0)),
            [total + dw.astype(jnp.float32) for total, dw in zip(dweights, new, strict=True)],
        )

    sums = _float32_zeros(x_ND), _float32_zeros(gates_NK.reshape(-1)), [_float32_zeros(w) for w in weights]
    dx_ND, dgates, dweights = _accumulate(rows, experts_NK, weights[0].shape[0], add, sums)
    dweights = [dw.astype(w.dtype) for dw, w in zip(dweights, weights, strict=True)]
    return dx_ND.astype(x_ND.dtype), dgates.reshape(gates_NK.shape), None, *dweights


_local_experts.defvjp(_forward, _backward)


def _accumulate(rows: int, experts_NK: jax.Array, n_experts: int, add: Callable[..., Any], sums: Any) -> Any:
    """Sorts (token, choice) pairs by expert and adds `rows` of them at a time to `sums`, until none is left.

    add(sums, choice_R, token_R, sizes_E, is_real_R) gets the indices of the rows among all choices and among tokens,
    the number of rows of each expert, and which rows are real.
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
    with expect_trips(1):  # as many as SLACK makes of an even load
        return jax.lax.fori_loop(0, -(-ends_E[-1] // rows), step, sums)


def _feed_forward(
    x_RD: jax.Array, gates_R: jax.Array, weights: tuple[jax.Array, ...], sizes_E: jax.Array, is_real_R: jax.Array
) -> jax.Array:
    """SwiGLU of each row by its expert, times its gate, [R, D]. Rows that are not real hold arbitrary values."""
    gate, up, down = weights
    if platform() == "cpu":
        experts_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x_RD)), side="right")
        return blocked_experts(x_RD, gates_R[:, None], experts_R[:, None], (gate, up, down))
    pre, value = (jnp.where(is_real_R[:, None], grouped_matmul(x_RD, w, sizes_E), 0) for w in (gate, up))
    hidden = nn.silu(pre) * value * gates_R[:, None].astype(x_RD.dtype)
    return grouped_matmul(hidden, down, sizes_E)


def _float32_zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, jnp.float32)
