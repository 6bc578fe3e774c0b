"""The TPU's grouped products, in interpreted mode, against dense products; and the experts that use them."""

from functools import partial

import jax
import numpy as np
import pytest

from mythos_jax.config import MeshConfig
from mythos_jax.ops import expert_parallel, expert_rows, grouped_matmul, megablox
from mythos_jax.ops.expert_parallel import experts_on_mesh
from mythos_jax.ops.experts import dense_over_all_experts
from mythos_jax.sharding import make_mesh, use_mesh

N, D, F, E = 200, 6, 7, 3


@pytest.fixture
def on_tpu(monkeypatch):
    """Takes the TPU's path, with kernels that a CPU interprets."""
    monkeypatch.setattr(megablox, "INTERPRET", True)
    for module in (grouped_matmul, expert_rows):
        monkeypatch.setattr(module, "platform", lambda: "tpu")


def test_products_equal_dense_ones(on_tpu):
    """Groups smaller than a tile, empty groups, one group with all rows, and rows that belong to no group, which hold
    NaN."""

    @jax.jit
    def products(x_ND, y_NF, w_EDF, sizes_E, sums_EDF):
        return (
            grouped_matmul.grouped_matmul(x_ND, w_EDF, sizes_E),
            grouped_matmul.grouped_matmul_transposed(y_NF, w_EDF, sizes_E),
            grouped_matmul.grouped_outer(x_ND, y_NF, sizes_E, None),
            grouped_matmul.grouped_outer(x_ND, y_NF, sizes_E, sums_EDF),
        )

    random = np.random.default_rng(0)
    shapes = [(N, D), (N, F), (E, D, F), (E, D, F)]
    x, y, w, sums = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    for sizes in [[64, 100, 36], [0, 200, 0], [0, 0, 150], [1, 128, 2]]:
        real = sum(sizes)
        x[real:] = y[real:] = np.nan
        out, transposed, outer = np.zeros((real, F)), np.zeros((real, D)), np.zeros((E, D, F))
        for n, e in enumerate(np.repeat(np.arange(E), sizes)):
            out[n], transposed[n] = x[n].astype(np.float64) @ w[e], w[e] @ y[n].astype(np.float64)
            outer[e] += np.outer(x[n].astype(np.float64), y[n])
        actual = products(x, y, w, np.array(sizes, np.int32), sums)
        actual = actual[0][:real], actual[1][:real], *actual[2:]
        for a, b in zip(actual, [out, transposed, outer, sums + outer], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


def test_sums_of_groups():
    """Of 300 groups some are empty and one has many rows; rows of no group hold NaN, and what is not finite in a row
    stays in its own group."""
    random = np.random.default_rng(0)
    group = np.sort(np.append(random.integers(0, 300, 300), [17] * 90 + [300] * 10)).astype(np.int32)
    rows = random.standard_normal((len(group), 5)).astype(np.float32)
    rows[group == 300] = np.nan
    expected = np.zeros((300, 5))
    np.add.at(expected, group[:-10], rows[:-10])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megablox, "INTERPRET", True)
        actual = jax.jit(partial(megablox.sums_of_groups, n_groups=300))(rows, group)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    rows[[3, 200], [1, 4]] = np.nan, np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megablox, "INTERPRET", True)
        actual = np.asarray(jax.jit(partial(megablox.sums_of_groups, n_groups=300))(rows, group))
    lost = np.isin(np.arange(300), group[[3, 200]])
    assert not np.isfinite(actual[lost]).any()
    np.testing.assert_allclose(actual[~lost], expected[~lost], rtol=0, atol=1e-5)


@pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
def test_experts_equal_dense_ones(on_tpu, exchange, monkeypatch):
    """On 8 devices, in two chunks, values and all gradients. In the second case all tokens choose the same two experts
    of one device, which needs several rounds; none is dropped."""
    B, T, D, F, E, K = 8, 24, 4, 5, 8, 2
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    x, gates, cotangent, scores = normal(B, T, D), np.abs(normal(B, T, K)), normal(B, T, D), normal(B, T, E)
    weights = normal(E, D, F) / 3, normal(E, D, F) / 3, normal(E, F, D) / 4
    monkeypatch.setattr(expert_parallel, "MAX_CHUNK_BYTES", 2**14)

    def value_and_gradients(layer):
        def run(chosen, x, gates, weights):
            y, vjp = jax.vjp(lambda x, gates, weights: layer(x, gates, chosen, weights), x, gates, weights)
            return y, vjp(cotangent)

        return jax.jit(run)

    dense = value_and_gradients(dense_over_all_experts)
    on_mesh = value_and_gradients(lambda *arguments: experts_on_mesh(*arguments, exchange=exchange)[0])
    for skew in [0, 20]:
        chosen = np.argsort(-scores - skew * np.arange(E), axis=-1)[..., :K].astype(np.int32)
        assert (chosen >= E - K).all() == (skew > 0)
        with use_mesh(make_mesh(MeshConfig(fsdp=2, expert=4))):
            actual = on_mesh(chosen, x, gates, weights)
        expected = dense(chosen, x, gates, weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), actual, expected)


@pytest.mark.parametrize(
    ("shape", "product", "outer"),
    [
        ((40960, 16, 2048, 2048), (256, 2048, 1024), (256, 1024, 512)),  # mythos_1b
        ((20480, 8, 4096, 4096), (256, 4096, 512), (256, 1024, 512)),
        ((512, 64, 2048, 2048), (128, 1024, 2048), (128, 1024, 512)),  # few rows: most matrices meet one tile
        ((64, 4, 100, 60), (128, 100, 60), (128, 100, 60)),
    ],
)
def test_tiles(shape, product, outer):
    """With many rows, a tile has the whole width that is summed over, so that an expert's matrix is read once."""
    assert megablox.product_tiles(*shape, 2) == product
    assert megablox.outer_tiles(*shape, 2, 4, True) == outer
