"""Next-token cross-entropy that never holds the logits of all positions at once."""

from functools import partial

import jax
import jax.numpy as jnp

from mythos_jax.ops.chunked import map_chunks, map_counted_chunks
from mythos_jax.sharding import axis_size, in_use, partition_spec


def cross_entropy(
    features_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    chunk_length: int | None = None,
    mask_BT: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy of each target in nats, float32 [B, T], under logits = features table^T.

    targets_BT: int32. mask_BT: where it is 0, the loss is 0, and chunks of such positions alone cost nothing
    (`map_counted_chunks`). chunk_length: positions per row whose logits exist at a time (default: see `map_chunks`);
    the backward pass recomputes them. The table's gradient is accumulated in the table's own dtype, float32 in
    training. On a mesh, each device first sums the gradient over its own tokens, so it is reduced across devices only
    once.
    """
    counts_BT = () if mask_BT is None else (mask_BT != 0,)
    if not in_use():
        return _local_cross_entropy(features_BTD, table_VD, targets_BT, *counts_BT, chunk_length=chunk_length)
    tokens_spec = partition_spec(targets_BT.shape, ("batch", "length"))
    features_spec = partition_spec(features_BTD.shape, ("batch", "length", "act_embed"))
    table_spec = partition_spec(table_VD.shape, ("vocab", "embed"))
    vocab_axis, width_axes = table_spec

    def per_device(features_BTD: jax.Array, table_VD: jax.Array, *tokens: jax.Array) -> jax.Array:
        if width_axes:
            table_VD = gather_width(width_axes, features_BTD.dtype, table_VD)
        return _local_cross_entropy(features_BTD, table_VD, *tokens, chunk_length=chunk_length, vocab_axis=vocab_axis)

    tokens = targets_BT, *counts_BT
    in_specs = features_spec, table_spec, *[tokens_spec] * len(tokens)
    run = jax.shard_map(per_device, in_specs=in_specs, out_specs=tokens_spec, check_vma=False)
    return run(features_BTD, table_VD, *tokens)


def _local_cross_entropy(
    features_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    counts_BT: jax.Array | None = None,
    *,
    chunk_length: int | None,
    vocab_axis: str | None = None,
) -> jax.Array:
    """Cross-entropy of one device's tokens. With `vocab_axis`, table_VD is this device's shard of the vocabulary."""
    V = table_VD.shape[0]
    if vocab_axis:  # from here on, targets count from the first token of this shard; others are out of range
        targets_BT = targets_BT - V * jax.lax.axis_index(vocab_axis)

    def loss(features_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_NV = device_logits(features_BCD, table_VD)
        return cross_entropy_of_logits(vocab_axis, logits_NV, targets_BC.reshape(-1)).reshape(targets_BC.shape)

    arrays = features_BTD, targets_BT
    if counts_BT is None:
        return map_chunks(loss, arrays, V, chunk_length)
    return map_counted_chunks(loss, arrays, counts_BT, V, chunk_length)


def device_logits(features_BCD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """The logits of one device's tokens, float32 [N, V]. B and C are merged: a product of two matrices is faster."""
    features_ND = features_BCD.reshape(-1, features_BCD.shape[-1])
    table = table_VD.astype(features_BCD.dtype)
    return jnp.einsum("ND,VD->NV", features_ND, table, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy_of_logits(vocab_axis: str | None, logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """Cross-entropy of each target. With `vocab_axis`, the logits are this device's shard of the vocabulary, from whose
    first token the targets count."""
    return _forward(vocab_axis, logits_NV, targets_N)[0]


def log_partition(vocab_axis: str | None, logits_NV: jax.Array) -> jax.Array:
    """The logarithm of the sum of exp(logits) over the vocabulary, which `vocab_axis` divides."""
    max_N = logits_NV.max(-1)
    if vocab_axis:
        max_N = jax.lax.pmax(max_N, vocab_axis)
    sum_N = jnp.exp(logits_NV - max_N[..., None]).sum(-1)
    if vocab_axis:
        sum_N = jax.lax.psum(sum_N, vocab_axis)
    return max_N + jnp.log(sum_N)


_Residuals = tuple[jax.Array, jax.Array, jax.Array]  # logits_NV, log_partition_N, targets_N


def _forward(vocab_axis: str | None, logits_NV: jax.Array, targets_N: jax.Array) -> tuple[jax.Array, _Residuals]:
    """The residuals hold the logits and nothing else of their size: the softmax is recomputed from them."""
    V = logits_NV.shape[-1]
    log_partition_N = log_partition(vocab_axis, logits_NV)
    target_logit_N = jnp.take_along_axis(logits_NV, jnp.clip(targets_N, 0, V - 1)[..., None], axis=-1)[..., 0]
    # The target is in exactly one shard; the others contribute 0 to its logit.
    target_logit_N = jnp.where((targets_N >= 0) & (targets_N < V), target_logit_N, 0)
    if vocab_axis:
        target_logit_N = jax.lax.psum(target_logit_N, vocab_axis)
    return log_partition_N - target_logit_N, (logits_NV, log_partition_N, targets_N)


def _backward(vocab_axis: str | None, residuals: _Residuals, ct_N: jax.Array) -> tuple[jax.Array, None]:
    logits_NV, log_partition_N, targets_N = residuals
    if vocab_axis:
        # With check_vma=False, `shard_map` splits the cotangent of a replicated output into equal parts, 1 / n each.
        ct_N = ct_N * axis_size(vocab_axis)
    is_target_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1) == targets_N[..., None]
    return (jnp.exp(logits_NV - log_partition_N[..., None]) - is_target_NV) * ct_N[..., None], None


cross_entropy_of_logits.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gather_width(axes: str | tuple[str, ...], dtype: jnp.dtype, table_VD: jax.Array) -> jax.Array:
    """The table gathered along D, in its own dtype. It is sent in `dtype`, its gradient in the table's own dtype."""
    return jax.lax.all_gather(table_VD.astype(dtype), axes, axis=1, tiled=True).astype(table_VD.dtype)


gather_width.defvjp(
    lambda axes, dtype, table_VD: (gather_width(axes, dtype, table_VD), None),
    lambda axes, dtype, _, ct: (jax.lax.psum_scatter(ct, axes, scatter_dimension=1, tiled=True),),
)
