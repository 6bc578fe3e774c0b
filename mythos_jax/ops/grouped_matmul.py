"""Products of rows sorted by expert with their expert's matrix: no token is dropped, no expert has a fixed capacity.

Three products, which are all that a feed-forward layer and its gradients need. Their implementation depends on the
platform of the mesh in use, also in ahead-of-time compilation: TPUs use Megablox (ops/megablox.py), NVIDIA's GPUs
kernels of our own (ops/grouped_triton.py), other GPUs `lax.ragged_dot`. XLA makes of `ragged_dot` a product of every
expert with every row (docs/pods.md): on GPUs and CPUs of all of it, on TPUs of the weight gradient. A CPU should use
`blocked_experts` instead. A kernel cannot be partitioned by XLA: on a mesh of several devices, call these inside a
`shard_map` with check_vma=False.

Shape suffixes: R rows, E experts, D and F the widths of their matrices. sizes_E: int32, rows of each expert; rows after
the last expert's hold arbitrary values, and so do their products.
"""

import jax
import jax.numpy as jnp

from mythos_jax.ops import grouped_triton
from mythos_jax.ops.slower import say_slower
from mythos_jax.sharding import is_nvidia, platform

ExpertWeights = tuple[jax.Array, jax.Array, jax.Array]  # gate and up [E, D, F], down [E, F, D]


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiplies rows by their expert's matrix: [R, F]. A kernel has no gradient; the other two products are its."""
    if platform() == "tpu":
        from mythos_jax.ops import megablox  # its kernels take half a second to import

        return megablox.product(x_RD, w_EDF, sizes_E)
    if is_nvidia():
        return grouped_triton.product(x_RD, w_EDF, sizes_E)
    if platform() != "cpu":
        reason = "there are kernels for TPUs and for NVIDIA's GPUs from the A100 on"
        say_slower("experts by lax.ragged_dot", "grouped products", reason)
    return jax.lax.ragged_dot(x_RD, w_EDF, sizes_E)


def grouped_matmul_transposed(y_RF: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiplies rows by their expert's matrix transposed, [R, D]: the gradient of `grouped_matmul` with regard to
    its rows."""
    if platform() == "tpu":
        from mythos_jax.ops import megablox

        return megablox.product(y_RF, w_EDF, sizes_E, transposed=True)
    if is_nvidia():
        return grouped_triton.product(y_RF, w_EDF, sizes_E, transposed=True)
    return jax.lax.ragged_dot(y_RF, w_EDF.swapaxes(1, 2), sizes_E)


def grouped_outer(x_RD: jax.Array, y_RF: jax.Array, sizes_E: jax.Array, sums_EDF: jax.Array | None) -> jax.Array:
    """For each expert, the product of its rows of x, transposed, with those of y: the gradient of `grouped_matmul` with
    regard to its weights. Float32 [E, D, F]; added to `sums_EDF`, where it is given, in place."""
    if platform() == "tpu":
        from mythos_jax.ops import megablox

        return megablox.outer(x_RD, y_RF, sizes_E, sums_EDF)
    if is_nvidia():
        return grouped_triton.outer(x_RD, y_RF, sizes_E, sums_EDF)
    w_EDF = jax.ShapeDtypeStruct((len(sizes_E), x_RD.shape[1], y_RF.shape[1]), x_RD.dtype)
    transpose = jax.linear_transpose(lambda w: jax.lax.ragged_dot(x_RD, w, sizes_E), w_EDF)
    new_EDF = transpose(y_RF)[0].astype(jnp.float32)
    return new_EDF if sums_EDF is None else sums_EDF + new_EDF
