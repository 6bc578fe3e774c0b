"""Next-token cross-entropy that never holds all logits at once."""

from functools import partial

import jax
import jax.numpy as jnp

from mythos_jax.ops.chunks import in_chunks
from mythos_jax.sharding import axis_size, in_use, placement


def cross_entropy(
    features_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int | None = None
) -> jax.Array:
    """Float32 nats of each target, [B, T], under logits = features table^T.

    chunk: positions whose logits exist at a time (default: see `in_chunks`); the backward pass computes them again. The
    table's gradient is summed in its own dtype, float32; on a mesh each device sums that of
    its own tokens first, and it travels once.
    """
    if not in_use():
        return _nats(features_BTD, table_VD, targets_BT, chunk)
    tokens_spec = placement(targets_BT.shape, ("batch", "length"))
    features_spec = placement(features_BTD.shape, ("batch", "length", "act_embed"))
    table_spec = placement(table_VD.shape, ("vocab", "embed"))
    vocab_axis, width_axes = table_spec

    def region(features_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        if width_axes:
            table_VD = _gathered(width_axes, features_BTD.dtype, table_VD)
        return _nats(features_BTD, table_VD, targets_BT, chunk, vocab_axis)

    run = jax.shard_map(
        region, in_specs=(features_spec, table_spec, tokens_spec), out_specs=tokens_spec, check_vma=False
    )
    return run(features_BTD, table_VD, targets_BT)


def _nats(
    features_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    chunk: int | None,
    vocab_axis: str | None = None,
) -> jax.Array:
    """The same on one device, whose table is the whole or, along `vocab_axis`, one part of several."""
    V = table_VD.shape[0]
    if vocab_axis:
        targets_BT = targets_BT - V * jax.lax.axis_index(vocab_axis)

    def nats(features, targets):
        table = table_VD.astype(features.dtype)
        rows_ND = features.reshape(-1, features.shape[-1])  # this is one device's part: a product of two matrices
        logits_NV = jnp.einsum("ND,VD->NV", rows_ND, table, preferred_element_type=jnp.float32)
        return _nats_of_logits(vocab_axis, logits_NV, targets.reshape(-1)).reshape(targets.shape)

    return in_chunks(nats, (features_BTD, targets_BT), V, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats_of_logits(vocab_axis: str | None, logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
    return _nats_forward(vocab_axis, logits_NV, targets_N)[0]


def _nats_forward(vocab_axis: str | None, logits_NV: jax.Array, targets_N: jax.Array):
    """Keeps the logits and their log-partition, and nothing else of their size."""

    def over_parts(reduce, x):
        return reduce(x, vocab_axis) if vocab_axis else x

    V = logits_NV.shape[-1]
    top_N = over_parts(jax.lax.pmax, logits_NV.max(-1))
    partition_N = top_N + jnp.log(over_parts(jax.lax.psum, jnp.exp(logits_NV - top_N[..., None]).sum(-1)))
    chosen_N = jnp.take_along_axis(logits_NV, jnp.clip(targets_N, 0, V - 1)[..., None], axis=-1)[..., 0]
    chosen_N = over_parts(jax.lax.psum, jnp.where((targets_N >= 0) & (targets_N < V), chosen_N, 0))
    return partition_N - chosen_N, (logits_NV, partition_N, targets_N)


def _nats_backward(vocab_axis: str | None, kept: tuple[jax.Array, jax.Array, jax.Array], ct_N: jax.Array):
    logits_NV, partition_N, targets_N = kept
    if vocab_axis:  # unchecked, `shard_map` gives each device its part, 1 / n
        ct_N = ct_N * axis_size(vocab_axis)
    hit_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1) == targets_N[..., None]
    return (jnp.exp(logits_NV - partition_N[..., None]) - hit_NV) * ct_N[..., None], None


_nats_of_logits.defvjp(_nats_forward, _nats_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(axes: str | tuple[str, ...], dtype: jnp.dtype, table_VD: jax.Array) -> jax.Array:
    """The table whole along D, in its own dtype: it travels in `dtype`, its gradient in its own."""
    return jax.lax.all_gather(table_VD.astype(dtype), axes, axis=1, tiled=True).astype(table_VD.dtype)


_gathered.defvjp(
    lambda axes, dtype, table_VD: (_gathered(axes, dtype, table_VD), None),
    lambda axes, dtype, _, ct: (jax.lax.psum_scatter(ct, axes, scatter_dimension=1, tiled=True),),
)
