"""Stored tables of RoPE: silent if they are the config's, one line if they are those rounded, refused if they are
others. The tables are computed here as the originals' code computes them, in float32."""

import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.porting.convert import convert, format_report
from mythos_jax.porting.reading import FileSource
from mythos_jax.porting.rope_tables import compare_table
from tests.porting import golden

CONFIG = ModelConfig(dim=64, n_heads=4, n_kv_heads=4, head_dim=16, rope_theta=50_000.0)


def frequencies(base, channels=16):
    exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    return np.float32(1) / np.float32(base) ** exponents


def angles(base, positions=512, channels=16):
    return np.outer(np.arange(positions, dtype=np.float32), frequencies(base, channels))


def pairs(base, **sizes):  # Huginn and Parcae
    x = angles(base, **sizes)
    return np.stack([np.cos(x)[None, :, None, :], np.sin(x)[None, :, None, :]], 4)


def phasors(base, **sizes):  # OpenMythos
    return np.exp(1j * angles(base, **sizes)).astype(np.complex64)


def doubled(function):  # old versions of transformers
    return lambda base: function(np.concatenate([angles(base)] * 2, -1))[None, None]


TABLES = {
    "freqs_cis": pairs,
    "freqs_cis ": phasors,
    "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies,
    "model.rotary_emb.cos_cached": doubled(np.cos),
    "model.rotary_emb.sin_cached": doubled(np.sin),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_same_table(name):
    for base in (10_000.0, 50_000.0, 500_000.0):
        assert compare_table(name.strip(), TABLES[name](base), replace(CONFIG, rope_theta=base)) is None


def test_tables_of_positions_and_channels_alone():
    for name in ("rotary_emb.cos_cached", "rotary_emb.sin_cached"):
        table = (np.cos if "cos" in name else np.sin)(np.concatenate([angles(50_000.0)] * 2, -1))
        assert compare_table(name, table, CONFIG) is None


@pytest.mark.parametrize("positions", [131_072, 300_001])
def test_long_tables(positions):
    """Their angles are rounded in float32, by more the later the position; another base is still seen."""
    table = phasors(500_000.0, positions=positions)
    config = replace(CONFIG, rope_theta=500_000.0)
    assert compare_table("freqs_cis", table, config) is None
    with pytest.raises(ConfigError, match="is the table of RoPE base 500000, allowed: the config's 500100"):
        compare_table("freqs_cis", table, replace(config, rope_theta=500_100.0))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", [name for name in TABLES if name.strip() == name])
def test_a_rounded_table_is_announced(name, dtype):
    exact = TABLES[name](50_000.0)
    largest = np.abs(exact.astype(dtype).astype(np.float64) - exact).max()
    note = compare_table(name, exact.astype(dtype), CONFIG)
    assert f"{name}: stored in {np.dtype(dtype).name}, computed here in float32; the largest difference is " in note
    assert float(note.partition("difference is ")[2].split(";")[0]) == pytest.approx(largest, rel=0.1)


@pytest.mark.parametrize("base", [10_000.0, 49_000.0, 10_500.0, 500_000.0])
@pytest.mark.parametrize("name", TABLES)
def test_the_table_of_another_base_is_refused(name, base):
    message = f"{name.strip()}: is the table of RoPE base {base:g}, allowed: the config's 50000"
    with pytest.raises(ConfigError, match=message):
        compare_table(name.strip(), TABLES[name](base), CONFIG)


def test_other_tables_are_refused():
    linear = angles(50_000.0) / 4  # positions condensed
    condensed = np.stack([np.cos(linear)[None, :, None, :], np.sin(linear)[None, :, None, :]], 4)
    with pytest.raises(
        ConfigError, match=r"freqs_cis: differs by 2\.0e\+00 from the table of the config's RoPE base 5000"
    ):
        compare_table("freqs_cis", condensed, CONFIG)
    with pytest.raises(ConfigError, match=r"differs by nan from the table|differs by .* from the table"):
        compare_table("freqs_cis", np.full((1, 8, 1, 8, 2), np.nan, np.float32), CONFIG)
    with pytest.raises(ConfigError, match=r"shape \[1, 8, 1, 4, 2\], dtype float32, not a table of RoPE over 16"):
        compare_table("freqs_cis", np.zeros((1, 8, 1, 4, 2), np.float32), CONFIG)
    with pytest.raises(ConfigError, match="dtype int32, not a table"):
        compare_table("freqs_cis", np.zeros((1, 8, 1, 8, 2), np.int32), CONFIG)


def test_tables_that_openmythos_keeps_without_using_them():
    assert compare_table("freqs_cis_mla", phasors(1.0, channels=6), CONFIG) is None
    mla = FileSource(golden.FOLDER / "openmythos_mla").config
    mla = replace(mla, qk_rope_head_dim=16, rope_theta=50_000.0)
    assert compare_table("freqs_cis", phasors(1.0, channels=6), mla) is None
    assert compare_table("freqs_cis_mla", phasors(50_000.0), mla) is None
    with pytest.raises(ConfigError, match="base 10000"):
        compare_table("freqs_cis_mla", phasors(10_000.0), mla)


def test_a_table_without_its_sines_is_announced():
    """`model.to(bfloat16)` makes OpenMythos's complex table real."""
    note = compare_table("freqs_cis", phasors(50_000.0).real.astype(ml_dtypes.bfloat16), CONFIG)
    assert "has no sines" in note


@pytest.mark.parametrize("name", ["parcae", "llama"])
def test_in_a_directory(name, tmp_path):
    """The report lists the table, says that it is rounded, and refuses another."""
    shutil.copytree(golden.FOLDER / name, tmp_path / "model")
    file, config = tmp_path / "model" / "model.safetensors", FileSource(golden.FOLDER / name).config
    channels = config.rope_dim
    key = "freqs_cis" if name == "parcae" else "model.layers.1.self_attn.rotary_emb.inv_freq"
    make = pairs if name == "parcae" else frequencies
    weights = load_file(file)
    assert config.rope_scaling == ("llama3" if name == "llama" else "none")  # the table is the one before the scaling
    table = make(config.rope_theta, channels=channels).astype(ml_dtypes.bfloat16)
    save_file(weights | {key: table}, file)
    report = convert(tmp_path / "model", tmp_path / "out", "mythos_jax", progress=False)
    assert f"recomputed, not read: {key}" in format_report(report)
    assert f"{key}: stored in bfloat16, computed here in float32" in format_report(report)
    save_file(weights | {key: make(777.0, channels=channels)}, file)
    report = convert(tmp_path / "model", tmp_path / "out2", "mythos_jax", progress=False)
    assert not report.ok
    assert f"{key}: is the table of RoPE base 777, allowed: the config's" in format_report(report)
