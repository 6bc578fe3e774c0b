"""One matrix product per expert over rows sorted by expert; nothing is dropped and nothing is padded to a capacity."""

import jax
import jax.numpy as jnp

from mythos_jax.sharding import platform

ExpertWeights = tuple[jax.Array, jax.Array, jax.Array]  # gate and up [E, D, F], down [E, F, D]


def grouped_matmul(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows [N, D], sorted by expert, times their expert's matrix: [N, F].

    sizes_E: int32 rows of each expert, summing to N. The form is chosen by the devices of the mesh in use, also ahead
    of time. `lax.ragged_dot` is for GPUs alone: its weight gradient costs every expert for every row on v5e, v6e and
    v5p (docs/pods.md), and on a CPU it all does, which has a form of its own, `blocked_experts`. A kernel cannot be
    partitioned: on a mesh of several TPUs, call this inside a `shard_map` (with check_vma=False).
    """
    return (megablox if platform() == "tpu" else jax.lax.ragged_dot)(x_ND, w_EDF, sizes_E)


def megablox(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """The TPU kernel of MegaBlocks (arXiv 2211.15841) that comes with JAX; sums in float32.

    A tile of rows holds rows of as many experts as it meets and is multiplied once for each, so there are at most
    N / m + E - 1 products of m rows.
    """
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # half a second, for those who have experts

    N, E = x_ND.shape[0], w_EDF.shape[0]
    m = tile_rows(N, E)
    x_ND = jnp.pad(x_ND, ((0, -N % m), (0, 0)))
    # Rows of no expert are never written: whatever lies there must reach neither the result nor a gradient.
    real_N1 = (jnp.arange(x_ND.shape[0]) < sizes_E.sum())[:, None]

    def tiles(_: int, k: int, n: int) -> tuple[int, int, int]:
        return m, min(k, 1024), min(n, 1024)

    out_NF = gmm(jnp.where(real_N1, x_ND, 0), w_EDF, sizes_E, x_ND.dtype, tiles, interpret=interpret)
    return jnp.where(real_N1, out_NF, 0)[:N]


def tile_rows(N: int, E: int) -> int:
    """Rows a tile: near the mean number of rows per expert, from 128 (the width of the systolic array) to 512."""
    return min(512, max(128, 1 << max(0, (N // E).bit_length() - 1)))
