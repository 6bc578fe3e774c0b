"""Routed experts on a mesh: no token is dropped, and no expert's weights move along the `expert` axis.

Two ways of bringing tokens and experts together, both inside a fully manual `shard_map`:

- `ring` (as in MaxText): each device gathers the tokens of its expert group, applies the experts it holds, and the
  group's sums are reduce-scattered back.
- `all_to_all`: each device sends a token only to the devices that hold the experts it chose.

Each device multiplies as many rows as were sent to its experts, rounded up (ops/expert_rows.py). Tokens are processed
together, because every pass reads all weights; only where the buffers would take much of a device's memory, in chunks.

Shape suffixes: N tokens of one device and chunk, K choices per token, E experts, S sending and R receiving devices in
[S, R], D model width, F hidden width.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mythos_jax.ops.expectations import expect_rows
from mythos_jax.ops.expert_rows import Sums, gradient_sums, local_experts
from mythos_jax.ops.grouped_matmul import ExpertWeights
from mythos_jax.ops.ragged_all_to_all import ragged_all_to_all
from mythos_jax.sharding import AXES, axis_size, constrain, in_use, mesh_axes, partition_spec

# What the rows of a chunk may take of a device's memory, in bytes: an eighth of the smallest chip's.
MAX_CHUNK_BYTES = 2 * 2**30
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
    sums: Sums = None,
) -> tuple[jax.Array, Sums]:
    """Each token's chosen experts, weighted by its gates, [B, T, D], on the mesh in use; and `sums` as they are.

    gates_BTK: float32. experts_BTK: int32. width_name: logical name of the weights' axis D; if the mesh shards it, the
    weights are gathered along it here, and their gradients are scattered. exchange: `ring` or `all_to_all`. sums: from
    `sums_on_mesh`, for weights that the mesh does not shard along D.
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
    sums_specs = None if sums is None else tuple(map(_sums_spec, layout.weights))
    run = jax.shard_map(
        partial(_on_device, layout, exchange),
        in_specs=(*[layout.tokens] * 3, layout.weights, sums_specs),
        out_specs=(layout.tokens, sums_specs),
        check_vma=False,
    )
    return run(x_BTD, gates_BTK, experts_BTK, weights, sums)


def sums_on_mesh(weights: ExpertWeights) -> ExpertWeights:
    """Arrays to hand to `experts_on_mesh` in every loop, in place of weights that have gradients.

    Their cotangents add up the gradients of all loops (see `local_experts`), each device's own along the first axis:
    devices add theirs once, after the last loop.
    """
    gate, up, down = map(_own_sums, weights, _weight_axes("act_embed"))
    return gate, up, down


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _own_sums(w: jax.Array, names: tuple[str, ...]) -> jax.Array:
    spec = _sums_spec(partition_spec(w.shape, names))
    n = math.prod(map(axis_size, mesh_axes(spec[:1])))
    return jax.lax.with_sharding_constraint(jnp.zeros((n, *w.shape), jnp.float32), spec)


_own_sums.defvjp(
    lambda w, names: (_own_sums(w, names), jnp.zeros(0, w.dtype)),
    lambda names, like, sums: (sums.sum(0).astype(like.dtype),),
)


def _sums_spec(weight: PartitionSpec) -> PartitionSpec:
    """Of [devices that hold the same part of a weight, *weight]."""
    return PartitionSpec(tuple(axis for axis in AXES if axis not in mesh_axes(weight)), *weight)


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
    weights: ExpertWeights,
    sums: Sums,
) -> tuple[jax.Array, Sums]:
    """The part of one device; all arrays are its shards."""
    (B, T, D), K = x_BTD.shape, experts_BTK.shape[-1]
    n_local = weights[0].shape[0]
    n_experts = n_local * layout.expert_shards
    if layout.width_axes:
        weights = _gather_width(layout.width_axes, weights)
    first_expert = jax.lax.axis_index("expert") * n_local if layout.expert_shards > 1 else 0
    row_bytes = SLACK * layout.token_shards * K / layout.expert_shards * _row_bytes(weights)  # of each token here
    n_chunks = max(1, math.ceil(B * T * row_bytes / MAX_CHUNK_BYTES))
    chunk_size = -(-B * T // n_chunks)
    # n_tokens may choose this device's experts. max_rows come if each of them chooses as many of these as possible.
    n_tokens = chunk_size * layout.token_shards
    even_rows = -(-n_tokens * K // layout.expert_shards)
    rows = max_rows = n_tokens * min(K, n_local)
    if layout.expert_shards > 1:
        rows = min(max_rows, _rounded(SLACK * even_rows))

    @jax.checkpoint
    def run_chunk(sums: Sums, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Sums, jax.Array]:
        if layout.token_shards > 1 and exchange == "all_to_all":
            with expect_rows(even_rows):
                return _exchanged_experts(rows, n_experts, *chunk, weights, sums)
        if layout.token_shards > 1:
            chunk = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), chunk)
        x_ND, gates_NK, experts_NK = chunk
        with expect_rows(even_rows):
            y_ND, sums = local_experts(rows, x_ND, gates_NK, experts_NK - first_expert, weights, sums)
        return sums, jax.lax.psum_scatter(y_ND, "expert", tiled=True) if layout.token_shards > 1 else y_ND

    def split(a: jax.Array, fill: int = 0) -> jax.Array:
        a = jnp.pad(a.reshape(B * T, -1), ((0, n_chunks * chunk_size - B * T), (0, 0)), constant_values=fill)
        return a.reshape(n_chunks, chunk_size, -1)

    # Padding is assigned to an expert that no device has.
    chunks = split(x_BTD), split(gates_BTK), split(experts_BTK, n_experts)
    own = jax.tree.map(lambda a: a[0], sums)
    if n_chunks > 1:
        own, y = jax.lax.scan(run_chunk, gradient_sums(weights) if own is None else own, chunks)
    else:
        own, y = run_chunk(own, jax.tree.map(lambda a: a[0], chunks))
    y = _sum_over_devices(layout.sum_axes, y)
    sums = None if sums is None else jax.tree.map(lambda a: a[None], own)
    return y.reshape(-1, D)[: B * T].reshape(B, T, D), sums


def _gather_width(axes: set[str], weights: ExpertWeights) -> ExpertWeights:
    """The weights with the whole of D, which these mesh axes shard."""

    def gather(w: jax.Array, width: int) -> jax.Array:
        w = _keep_gradient_here(w)
        for axis in axes:
            w = jax.lax.all_gather(w, axis, axis=width, tiled=True)
        return w

    gate, up, down = weights
    return gather(gate, 1), gather(up, 1), gather(down, 2)


def _rounded(rows: float) -> int:
    """Rounded up to fill the tiles of the grouped products, where that adds little."""
    tile = 256 if rows > 4096 else 8
    return tile * math.ceil(rows / tile)


def _row_bytes(weights: ExpertWeights) -> int:
    """What a row takes in the backward pass: x, its gradient and the output's, and five arrays of hidden width."""
    _, D, F = weights[0].shape
    return (3 * D + 5 * F) * weights[0].dtype.itemsize


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
    rows: int,
    n_experts: int,
    x_ND: jax.Array,
    gates_NK: jax.Array,
    experts_NK: jax.Array,
    weights: ExpertWeights,
    sums: Sums,
) -> tuple[Sums, jax.Array]:
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
    out, sums = local_experts(rows, received, jnp.ones((max_rows, 1)), experts[:, None], weights, sums)
    returned = ragged_all_to_all("expert", N * K, out, sizes_SR.T).astype(jnp.float32)
    weighted = returned * gates_NK.reshape(-1)[order][:, None]
    return sums, jnp.zeros(x_ND.shape, jnp.float32).at[order // K].add(weighted).astype(x_ND.dtype)
