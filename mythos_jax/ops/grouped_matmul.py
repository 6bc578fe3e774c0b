"""One matrix product per expert over rows sorted by expert; nothing is dropped and nothing is padded to a capacity."""

import jax
import jax.numpy as jnp


def grouped_matmul(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows [N, D], sorted by expert, times their expert's matrix: [N, F].

    sizes_E: int32 rows of each expert, summing to N. The form is chosen by the devices of the mesh in use, also ahead
    of time. `lax.ragged_dot` is for GPUs alone: on CPU it costs every expert for every row, and so does its weight
    gradient on v5e, v6e and v5p (docs/pods.md). A kernel cannot be partitioned: on a mesh of several TPUs, call this
    inside a `shard_map` (with check_vma=False).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return _FORMS.get(device.platform, jax.lax.ragged_dot)(x_ND, w_EDF, sizes_E)
    forms = {"cpu": _blocked, "default": jax.lax.ragged_dot}
    if jax.default_backend() == "tpu":  # tracing the kernel takes a third of a second that others need not wait
        forms["tpu"] = megablox
    return jax.lax.platform_dependent(x_ND, w_EDF, sizes_E, **forms)


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


def _blocked(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Cuts each expert's rows into blocks of m, the last one padded, and multiplies block by block.

    There are at most (N + E (m - 1)) / m blocks whatever the routing, so the cost stays near N D F.
    """
    (N, D), (E, _, F) = x_ND.shape, w_EDF.shape
    m = block_rows(N, E)
    n_blocks = (N + E * (m - 1)) // m
    blocks_E = -(-sizes_E // m)
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    first_row_E = jnp.cumsum(sizes_E) - sizes_E
    expert_N = jnp.repeat(jnp.arange(E), sizes_E, total_repeat_length=N)
    place_N = m * first_block_E[expert_N] + jnp.arange(N) - first_row_E[expert_N]
    expert_of_block = jnp.searchsorted(jnp.cumsum(blocks_E), jnp.arange(n_blocks), side="right").clip(max=E - 1)
    blocks = jnp.zeros((n_blocks * m, D), x_ND.dtype).at[place_N].set(x_ND, unique_indices=True)
    products = jnp.einsum("nmd,ndf->nmf", blocks.reshape(n_blocks, m, D), w_EDF[expert_of_block])
    return products.reshape(n_blocks * m, F)[place_N]


def block_rows(N: int, E: int) -> int:
    """Rows a block: a power of two near the mean number of rows per expert, at most 128."""
    return min(128, 1 << max(0, (N // E).bit_length() - 1))


_FORMS = {"cpu": _blocked, "tpu": megablox}
