"""Cross-entropy, and how far predictions are from a teacher's, without the logits of all positions of either model."""

from functools import partial

import jax
import jax.numpy as jnp

from mythos_jax.ops.chunked import map_counted_chunks
from mythos_jax.ops.cross_entropy import cross_entropy_of_logits, device_logits, gather_width, log_partition
from mythos_jax.sharding import axis_size, in_use, partition_spec

Head = tuple[jax.Array, jax.Array]  # features [B, T, D], and the matrix [V, D] that they are multiplied with
Losses = tuple[jax.Array, jax.Array]


def distillation(
    student: Head,
    teacher: Head,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Losses:
    """In nats, float32 [B, T]: the cross-entropy of each target, as `cross_entropy` computes it, and
    KL(teacher || student) of the distributions softmax(logits / temperature). Both are 0 where the mask is.

    The heads of both models are applied to a few positions at a time, and again in the backward pass. No gradient flows
    into the teacher's.
    """
    teacher, counts_BT = jax.lax.stop_gradient(teacher), mask_BT != 0
    if not in_use():
        return _local(student, teacher, targets_BT, counts_BT, temperature, chunk_length)
    tokens_spec = partition_spec(targets_BT.shape, ("batch", "length"))
    specs = [
        (
            partition_spec(features_BTD.shape, ("batch", "length", "act_embed")),
            partition_spec(table_VD.shape, ("vocab", "embed")),
        )
        for features_BTD, table_VD in (student, teacher)
    ]
    vocab_axis = specs[0][1][0]

    def per_device(student: Head, teacher: Head, targets_BT: jax.Array, counts_BT: jax.Array) -> Losses:
        heads = [_gathered(head, spec[1][1]) for head, spec in zip((student, teacher), specs, strict=True)]
        return _local(heads[0], heads[1], targets_BT, counts_BT, temperature, chunk_length, vocab_axis)

    run = jax.shard_map(
        per_device,
        in_specs=(specs[0], specs[1], tokens_spec, tokens_spec),
        out_specs=(tokens_spec, tokens_spec),
        check_vma=False,
    )
    return run(student, teacher, targets_BT, counts_BT)


def _gathered(head: Head, width_axes: str | tuple[str, ...] | None) -> Head:
    features_BTD, table_VD = head
    return features_BTD, gather_width(width_axes, features_BTD.dtype, table_VD) if width_axes else table_VD


def _local(
    student: Head,
    teacher: Head,
    targets_BT: jax.Array,
    counts_BT: jax.Array,
    temperature: float,
    chunk_length: int | None,
    vocab_axis: str | None = None,
) -> Losses:
    """The losses of one device's tokens. With `vocab_axis`, the tables are this device's shards of the vocabulary."""
    (features_BTD, table_VD), (teacher_BTE, teacher_VE) = student, teacher
    V = table_VD.shape[0]
    if vocab_axis:
        targets_BT = targets_BT - V * jax.lax.axis_index(vocab_axis)

    def losses(features_BCD: jax.Array, teacher_BCE: jax.Array, targets_BC: jax.Array) -> Losses:
        logits_NV, teacher_NV = device_logits(features_BCD, table_VD), device_logits(teacher_BCE, teacher_VE)
        nats_N = cross_entropy_of_logits(vocab_axis, logits_NV, targets_BC.reshape(-1))
        kl_N = kl_of_logits(vocab_axis, temperature, logits_NV, teacher_NV)
        return nats_N.reshape(targets_BC.shape), kl_N.reshape(targets_BC.shape)

    return map_counted_chunks(losses, (features_BTD, teacher_BTE, targets_BT), counts_BT, V, chunk_length)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def kl_of_logits(vocab_axis: str | None, temperature: float, logits_NV: jax.Array, teacher_NV: jax.Array) -> jax.Array:
    """KL(teacher || student) at a temperature, in nats. With `vocab_axis`, these are shards of the vocabulary."""
    return _forward(vocab_axis, temperature, logits_NV, teacher_NV)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # logits, teacher's logits, both log partitions


def _forward(
    vocab_axis: str | None, temperature: float, logits_NV: jax.Array, teacher_NV: jax.Array
) -> tuple[jax.Array, _Residuals]:
    """The residuals hold the logits of both and nothing else of their size."""
    log_z_N = log_partition(vocab_axis, logits_NV / temperature)
    teacher_log_z_N = log_partition(vocab_axis, teacher_NV / temperature)
    teacher_p_NV = jnp.exp(teacher_NV / temperature - teacher_log_z_N[:, None])
    gap_N = (teacher_p_NV * ((teacher_NV - logits_NV) / temperature)).sum(-1)
    if vocab_axis:
        gap_N = jax.lax.psum(gap_N, vocab_axis)
    return gap_N + log_z_N - teacher_log_z_N, (logits_NV, teacher_NV, log_z_N, teacher_log_z_N)


def _backward(
    vocab_axis: str | None, temperature: float, residuals: _Residuals, ct_N: jax.Array
) -> tuple[jax.Array, None]:
    logits_NV, teacher_NV, log_z_N, teacher_log_z_N = residuals
    if vocab_axis:
        ct_N = ct_N * axis_size(vocab_axis)  # as for the cross-entropy
    p_NV = jnp.exp(logits_NV / temperature - log_z_N[:, None])
    teacher_p_NV = jnp.exp(teacher_NV / temperature - teacher_log_z_N[:, None])
    return (p_NV - teacher_p_NV) * (ct_N / temperature)[:, None], None


kl_of_logits.defvjp(_forward, _backward)
