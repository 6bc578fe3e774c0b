"""Rows and tables, and the published parameter counts that the configs and tables must reproduce."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mythos_jax.config import load_config
from mythos_jax.porting.families import FAMILIES
from mythos_jax.porting.family import parameter_shapes
from mythos_jax.porting.layouts import FROM_HEADS, LINEAR, SAME, TO_HEADS, to_ours, to_theirs
from mythos_jax.porting.tables import Table, concat, rename, split, stack, with_prefix

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {
    # arXiv 2604.12946, table 19
    "parcae_140m": 144_323_136,
    "parcae_370m": 388_003_328,
    "parcae_770m": 776_655_680,
    "parcae_1_3b": 1_338_591_744,
    # seal-rg/recurrent-pretraining
    "huginn_0125": 3_564_976_800,
    # open_mythos.variants of open-mythos 0.5.0, built on torch's meta device
    "mythos_1b": 1_064_028_034,
    "mythos_3b": 3_041_725_186,
    "mythos_10b": 9_981_316_994,
    "mythos_50b": 50_374_247_426,
    "mythos_100b": 99_545_072_130,
    "mythos_500b": 497_849_137_154,
    "mythos_1t": 999_326_352_386,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    config = load_config(CONFIGS / f"{name}.yaml").model
    family = FAMILIES[{"mythos": "openmythos"}.get(name.split("_")[0], name.split("_")[0])]
    shapes = parameter_shapes(config)
    assert sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("params.")) == PUBLISHED[name]
    # The original can express each of them, and its tensors hold as many numbers as ours.
    assert family.inexpressible(config) == []
    theirs = family.table(config).their_shapes
    bias = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("balance."))
    assert sum(map(math.prod, theirs.values())) == PUBLISHED[name] + bias


def test_layouts_of_large_models():
    """Shapes that the originals' own files state."""
    huginn = FAMILIES["huginn"].table(load_config(CONFIGS / "huginn_0125.yaml").model).their_shapes
    assert huginn["transformer.core_block.3.attn.Wqkv.weight"] == (15840, 5280)
    assert huginn["transformer.coda.1.attn.qk_bias"] == (2, 1, 55, 96)
    assert huginn["transformer.prelude.0.mlp.fc.weight"] == (35840, 5280)
    assert huginn["transformer.adapter.weight"] == (5280, 10560)
    parcae = FAMILIES["parcae"].table(load_config(CONFIGS / "parcae_140m.yaml").model).their_shapes
    assert [name for name in parcae if name.startswith("value_embeds")] == [
        f"value_embeds.{i}.weight" for i in (1, 3, 5)
    ]
    assert parcae["transformer.coda.1.attn.ve_gate.weight"] == (6, 32)


H, K, D, E = 3, 2, 5, 4
ROWS = {
    "rename": (rename("a", "x", TO_HEADS), {"x": (D, H, K)}, {"a": (H * K, D)}),
    "same layout": (rename("a", "x", SAME), {"x": (D,)}, {"a": (D,)}),
    "split": (split("a", ["x", "y"], TO_HEADS), {"x": (D, H, K), "y": (D, 1, K)}, {"a": (H * K + K, D)}),
    "split bias": (split("a", ["x", "y"], "1 1 h k -> h k"), {"x": (H, K), "y": (H, K)}, {"a": (2, 1, H, K)}),
    "concat": (concat(["a", "b"], "x", TO_HEADS, 2, (2, 4)), {"x": (D, H, 6)}, {"a": (H * 2, D), "b": (H * 4, D)}),
    "stack": (stack(["a", "b"], "x", LINEAR), {"x": (2, D, E)}, {"a": (E, D), "b": (E, D)}),
    "stack of one": (stack(["a"], "x", LINEAR), {"x": (1, D, E)}, {"a": (E, D)}),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_in_both_directions(case):
    row, ours, theirs = ROWS[case]
    table = Table([row], ours)
    assert table.their_shapes == theirs
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape) for name, shape in theirs.items()}
    read = {path: table.read(path, arrays.__getitem__) for path in ours}
    assert {path: array.shape for path, array in read.items()} == ours
    written = dict(row.write(read.__getitem__))
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(written[name], array)


@pytest.mark.parametrize("layout", [LINEAR, FROM_HEADS, TO_HEADS])
def test_layouts_keep_every_bit(layout):
    """Values are moved, never computed: NaNs keep their payload, and bfloat16 is not widened."""
    shape = (D, E) if layout == LINEAR else (H, K, D) if layout == FROM_HEADS else (D, H, K)
    bits = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    ours = bits.view(ml_dtypes.bfloat16)
    again = to_ours(layout, to_theirs(layout, ours), shape)
    assert again.dtype == ours.dtype
    np.testing.assert_array_equal(again.view(np.uint16), bits)


def test_prefixes():
    (row,) = with_prefix([split("qk", ["q", "k"], LINEAR)], "block.0.", "params.layer_0.")
    assert row.theirs == ("block.0.qk",)
    assert row.ours == ("params.layer_0.q", "params.layer_0.k")


def test_order_of_heads_and_channels():
    """Head h of a projection is rows h K to h K + K of the [out, in] weight."""
    table = Table([ROWS["rename"][0]], ROWS["rename"][1])
    weight = np.arange(H * K * D).reshape(H * K, D)
    ours = table.read("x", {"a": weight}.__getitem__)
    for head in range(H):
        np.testing.assert_array_equal(ours[:, head], weight[head * K : (head + 1) * K].T)


def test_table_that_does_not_fit_the_model():
    with pytest.raises(AssertionError, match="does not fit the model"):
        Table([rename("a", "x")], {"x": (1,), "y": (1,)})
