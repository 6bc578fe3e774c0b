"""Attention in blocks and by the splash kernel, on one device and on a mesh, against dense attention; gradients too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.ops import attention
from mythos_jax.ops.attention import SAVED, Mask, attend, dense_attention
from mythos_jax.ops.blockwise import blockwise_attention
from mythos_jax.ops.splash_attention import splash_attention
from mythos_jax.sharding import make_mesh, use_mesh

SCALE = 0.3


def random_arrays(B, T, S, H, G, K, V):
    """Queries, keys, values and a cotangent."""
    random = np.random.default_rng(0)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def value_and_gradients(attention, q, k, v, ct, mask):
    @jax.jit
    def run(q, k, v, ct, mask):
        out, vjp = jax.vjp(lambda *x: attention(*x, mask), q, k, v)
        return out, *vjp(ct)

    return run(q, k, v, ct, mask)


def expected_values(*arguments):
    return value_and_gradients(lambda q, k, v, mask: dense_attention(q, k, v, mask, SCALE), *arguments)


def assert_close(actual, expected):
    names = "value", "gradient of queries", "gradient of keys", "gradient of values"
    for name, a, b in zip(names, actual, expected, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "block", "kind"),
    [
        ((2, 13, 13, 4, 2, 6, 6), 4, "causal"),
        ((2, 13, 13, 4, 2, 6, 6), 5, "segments"),
        ((2, 7, 19, 4, 1, 6, 3), 4, "index"),  # behind a cache, rows at different positions; narrower values, as in MLA
        ((1, 9, 9, 3, 3, 4, 8), 16, "causal"),  # a single block
    ],
)
def test_blockwise_attention_equals_dense_attention(shape, block, kind):
    T, S = shape[1:3]
    segments = np.repeat([[1, 2, 3, 0], [5, 5, 7, 7]], [4, 3, 3, 3], axis=1).astype(np.int32)
    index = (np.array([[3], [S - T]]) + np.arange(T)).astype(np.int32)
    mask = {"causal": Mask(), "segments": Mask(segments_BT=segments), "index": Mask(index_BT=index)}[kind]

    def blockwise(q, k, v, mask):
        segments = mask.segments_BT
        pair = None if segments is None else (segments, segments)
        return blockwise_attention(q, k, v, mask.index(T), pair, SCALE, SAVED, block)

    arguments = *random_arrays(*shape), mask
    assert_close(value_and_gradients(blockwise, *arguments), expected_values(*arguments))


def test_blocks_of_keys_that_no_query_sees_are_not_read():
    """The unused slots of a cache may hold anything, even NaN."""
    q, k, v, _ = random_arrays(1, 4, 16, 2, 1, 4, 4)
    k[:, 8:], v[:, 8:] = np.nan, np.nan
    out = blockwise_attention(q, k, v, jnp.arange(4)[None] + 3, None, SCALE, SAVED, max_block=4)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_each_device_attends_for_its_own_rows_heads_and_queries(kv_heads, monkeypatch):
    """Also with fewer kv heads than devices along the axis that shards the heads."""
    monkeypatch.setattr(attention, "MAX_DENSE_QUERIES", 1)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2), jax.devices()[:8])
    segments = np.repeat([[1, 2]] * 2, 4, axis=1).astype(np.int32)
    arguments = *random_arrays(2, 8, 8, 4, kv_heads, 6, 4), Mask(segments_BT=segments)
    with use_mesh(mesh):
        actual = value_and_gradients(lambda q, k, v, mask: attend(q, k, v, mask, SCALE), *arguments)
    assert_close(actual, expected_values(*arguments))


@pytest.mark.parametrize(("T", "n_shards"), [(150, 1), (256, 2)])  # with padding; with queries sharded over a mesh axis
def test_splash_attention_equals_dense_attention(T, n_shards):
    """In interpreted mode, since there is no TPU. Grouped heads, two documents, different widths of keys and values."""
    segments = np.repeat([[1, 2]], T // 2, axis=1).astype(np.int32)
    arguments = *random_arrays(1, T, T, 4, 2, 24, 40), Mask(segments_BT=segments)

    def per_device(q, k, v, query_segments, key_segments):
        i = jax.lax.axis_index("sequence") if n_shards > 1 else 0
        segments = query_segments, key_segments
        return splash_attention(q, k, v, segments, SCALE, SAVED, (i, n_shards), interpret=True)

    def splash(q, k, v, mask):
        sharded, replicated = PartitionSpec(None, "sequence"), PartitionSpec()
        in_specs = sharded, replicated, replicated, sharded, replicated
        run = jax.shard_map(per_device, in_specs=in_specs, out_specs=sharded, check_vma=False)
        return (run if n_shards > 1 else per_device)(q, k, v, mask.segments_BT, mask.segments_BT)

    with use_mesh(make_mesh(MeshConfig(fsdp=1, sequence=n_shards), jax.devices()[:n_shards])):
        assert_close(value_and_gradients(splash, *arguments), expected_values(*arguments))


@pytest.mark.parametrize(("K", "V"), [(12, 6), (6, 12), (16, 16)])  # as in MLA, the other way round, as in GQA
def test_widths_are_padded_for_cudnn_without_a_trace(K, V):
    q, k, v, ct = random_arrays(2, 13, 13, 4, 2, K, V)
    padded = partial(attention._cudnn, scale=SCALE, implementation="xla")
    actual = value_and_gradients(lambda q, k, v, mask: padded(q, k, v, None, None), q, k, v, ct, Mask())
    assert_close(actual, expected_values(q, k, v, ct, Mask()))


def test_saved_residuals_spare_the_backward_pass_the_forward_pass():
    """Attention has two products forward and five backward, which include the recomputed scores."""
    q, k, v, ct = random_arrays(1, 8, 8, 2, 1, 4, 6)

    def count_products(*saved_names):
        def attend(q, k, v):
            return jnp.sin(blockwise_attention(jnp.sin(q), k, v, jnp.arange(8)[None], None, SCALE, SAVED, max_block=8))

        policy = jax.checkpoint_policies.save_only_these_names(*saved_names)
        rematerialised = jax.checkpoint(attend, policy=policy)
        jaxpr = jax.make_jaxpr(lambda q, k, v, ct: jax.vjp(rematerialised, q, k, v)[1](ct))(q, k, v, ct)
        return str(jaxpr).count("dot_general[")

    assert count_products(SAVED) == 2 + 5
    assert count_products() == 2 + 2 + 5
