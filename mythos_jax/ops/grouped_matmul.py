"""One matrix product per expert over rows sorted by expert: no token is dropped and no expert has a fixed capacity."""

import jax
import jax.numpy as jnp

from mythos_jax.sharding import platform

ExpertWeights = tuple[jax.Array, jax.Array, jax.Array]  # gate and up [E, D, F], down [E, F, D]


def grouped_matmul(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiplies rows [N, D], sorted by expert, by their expert's matrix: [N, F].

    sizes_E: int32, rows of each expert, with sum N. The implementation depends on the platform of the mesh in use, also
    in ahead-of-time compilation. Only GPUs use `lax.ragged_dot`: on TPU v5e, v6e and v5p its weight gradient computes
    every expert for every row (docs/pods.md), and on a CPU so does all of it. A CPU should use `blocked_experts`
    instead. A kernel cannot be partitioned by XLA: on a mesh of several TPUs, call this inside a `shard_map` with
    check_vma=False.
    """
    return (megablox if platform() == "tpu" else jax.lax.ragged_dot)(x_ND, w_EDF, sizes_E)


def megablox(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """The TPU kernel of MegaBlocks (arXiv 2211.15841) that ships with JAX; it accumulates in float32.

    A tile of m rows is multiplied once for each expert that has rows in it, so there are at most N / m + E - 1 products
    of m rows. interpret: run on a CPU, slowly, for tests.
    """
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # importing it takes half a second, so only when needed

    N, E = x_ND.shape[0], w_EDF.shape[0]
    m = tile_rows(N, E)
    x_ND = jnp.pad(x_ND, ((0, -N % m), (0, 0)))
    # The kernel does not write rows that belong to no expert. Their memory is uninitialised, so it must reach neither
    # the result nor a gradient.
    is_real_N1 = (jnp.arange(x_ND.shape[0]) < sizes_E.sum())[:, None]

    def tile_sizes(_: int, k: int, n: int) -> tuple[int, int, int]:
        return m, min(k, 1024), min(n, 1024)

    out_NF = gmm(jnp.where(is_real_N1, x_ND, 0), w_EDF, sizes_E, x_ND.dtype, tile_sizes, interpret=interpret)
    return jnp.where(is_real_N1, out_NF, 0)[:N]


def tile_rows(N: int, E: int) -> int:
    """Rows per tile: about the mean number of rows per expert, from 128 (the width of the systolic array) to 512."""
    return min(512, max(128, 1 << max(0, (N // E).bit_length() - 1)))
