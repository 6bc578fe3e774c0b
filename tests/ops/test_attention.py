"""Attention in blocks, by itself and on a mesh, beside the same sums written out whole; gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.ops import attention
from mythos_jax.ops.attention import SAVED, Mask, attend, whole
from mythos_jax.ops.blockwise import blockwise
from mythos_jax.ops.splash import splash
from mythos_jax.sharding import make_mesh, use_mesh

SCALE = 0.3


def arrays(B, T, S, H, G, K, V):
    random = np.random.default_rng(0)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def value_and_gradients(form, q, k, v, ct, mask):
    @jax.jit
    def run(q, k, v, ct, mask):
        out, back = jax.vjp(lambda *x: form(*x, mask), q, k, v)
        return out, *back(ct)

    return run(q, k, v, ct, mask)


def assert_alike(found, expected):
    for name, a, b in zip(("value", "by queries", "by keys", "by values"), found, expected, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)


def truth(*arguments):
    return value_and_gradients(lambda q, k, v, mask: whole(q, k, v, mask, SCALE), *arguments)


@pytest.mark.parametrize(
    ("shape", "block", "kind"),
    [
        ((2, 13, 13, 4, 2, 6, 6), 4, "causal"),
        ((2, 13, 13, 4, 2, 6, 6), 5, "segments"),
        ((2, 7, 19, 4, 1, 6, 3), 4, "index"),  # behind a cache, each row at its own place; values narrower, as in MLA
        ((1, 9, 9, 3, 3, 4, 8), 16, "causal"),  # one block
    ],
)
def test_blocks_give_what_all_scores_at_a_time_give(shape, block, kind):
    T, S = shape[1:3]
    segments = np.repeat([[1, 2, 3, 0], [5, 5, 7, 7]], [4, 3, 3, 3], axis=1).astype(np.int32)
    index = (np.array([[3], [S - T]]) + np.arange(T)).astype(np.int32)
    mask = {"causal": Mask(), "segments": Mask(segments_BT=segments), "index": Mask(index_BT=index)}[kind]

    def form(q, k, v, mask):
        segments = mask.segments_BT
        pair = None if segments is None else (segments, segments)
        return blockwise(q, k, v, mask.index(T), pair, SCALE, SAVED, block)

    arguments = *arrays(*shape), mask
    assert_alike(value_and_gradients(form, *arguments), truth(*arguments))


def test_keys_that_no_query_sees_are_not_looked_at():
    """A cache's empty places may hold anything: what is not read cannot spoil a sum."""
    q, k, v, _ = arrays(1, 4, 16, 2, 1, 4, 4)
    k[:, 8:], v[:, 8:] = np.nan, np.nan
    out = blockwise(q, k, v, jnp.arange(4)[None] + 3, None, SCALE, SAVED, block=4)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_each_device_attends_for_its_rows_heads_and_queries(kv_heads, monkeypatch):
    """With fewer kv heads than devices that cut the heads, too; keys and values are nowhere gathered by rows."""
    monkeypatch.setattr(attention, "FEW", 1)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2), jax.devices()[:8])
    segments = np.repeat([[1, 2]] * 2, 4, axis=1).astype(np.int32)
    arguments = *arrays(2, 8, 8, 4, kv_heads, 6, 4), Mask(segments_BT=segments)
    with use_mesh(mesh):
        found = value_and_gradients(lambda q, k, v, mask: attend(q, k, v, mask, SCALE), *arguments)
    assert_alike(found, truth(*arguments))


@pytest.mark.parametrize(("T", "parts"), [(150, 1), (256, 2)])  # with padding; queries cut along the sequence
def test_the_kernel_of_tpus_gives_what_all_scores_at_a_time_give(T, parts):
    """Interpreted: no TPU runs it here. Grouped heads, two documents, widths that differ."""
    segments = np.repeat([[1, 2]], T // 2, axis=1).astype(np.int32)
    arguments = *arrays(1, T, T, 4, 2, 24, 40), Mask(segments_BT=segments)

    def part(q, k, v, of_queries, of_keys):
        i = jax.lax.axis_index("sequence") if parts > 1 else 0
        return splash(q, k, v, (of_queries, of_keys), SCALE, SAVED, (i, parts), interpret=True)

    def form(q, k, v, mask):
        cut, whole = PartitionSpec(None, "sequence"), PartitionSpec()
        run = jax.shard_map(part, in_specs=(cut, whole, whole, cut, whole), out_specs=cut, check_vma=False)
        return (run if parts > 1 else part)(q, k, v, mask.segments_BT, mask.segments_BT)

    with use_mesh(make_mesh(MeshConfig(fsdp=1, sequence=parts), jax.devices()[:parts])):
        assert_alike(value_and_gradients(form, *arguments), truth(*arguments))


def test_what_is_kept_spares_the_backward_pass_the_forward():
    """Of two products forward and five backward, which make the scores again."""
    q, k, v, ct = arrays(1, 8, 8, 2, 1, 4, 6)

    def products(*names):
        def form(q, k, v):
            return jnp.sin(blockwise(jnp.sin(q), k, v, jnp.arange(8)[None], None, SCALE, SAVED, block=8))

        policy = jax.checkpoint_policies.save_only_these_names(*names)
        again = jax.checkpoint(form, policy=policy)
        return str(jax.make_jaxpr(lambda q, k, v, ct: jax.vjp(again, q, k, v)[1](ct))(q, k, v, ct)).count(
            "dot_general["
        )

    assert products(SAVED) == 2 + 5
    assert products() == 2 + 2 + 5
