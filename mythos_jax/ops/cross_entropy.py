"""Next-token cross-entropy that never holds all logits at once."""

from functools import partial

import jax
import jax.numpy as jnp

from mythos_jax.ops.chunks import in_chunks
from mythos_jax.sharding import in_use, placement


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

    def over_parts(reduce, x):
        return reduce(x, vocab_axis) if vocab_axis else x

    def nats(features, targets):
        table = table_VD.astype(features.dtype)
        logits = jnp.einsum("BTD,VD->BTV", features, table, preferred_element_type=jnp.float32)
        top = over_parts(jax.lax.pmax, jax.lax.stop_gradient(logits.max(-1)))
        total = over_parts(jax.lax.psum, jnp.exp(logits - top[..., None]).sum(-1))
        chosen = jnp.take_along_axis(logits, jnp.clip(targets, 0, V - 1)[..., None], axis=-1)[..., 0]
        chosen = over_parts(jax.lax.psum, jnp.where((targets >= 0) & (targets < V), chosen, 0))
        return top + jnp.log(total) - chosen

    return in_chunks(nats, (features_BTD, targets_BT), V, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(axes: str | tuple[str, ...], dtype: jnp.dtype, table_VD: jax.Array) -> jax.Array:
    """The table whole along D, in its own dtype: it travels in `dtype`, its gradient in its own."""
    return jax.lax.all_gather(table_VD.astype(dtype), axes, axis=1, tiled=True).astype(table_VD.dtype)


_gathered.defvjp(
    lambda axes, dtype, table_VD: (_gathered(axes, dtype, table_VD), None),
    lambda axes, dtype, _, ct: (jax.lax.psum_scatter(ct, axes, scatter_dimension=1, tiled=True),),
)
