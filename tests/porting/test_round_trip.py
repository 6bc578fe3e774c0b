"""Round trips are exact bit by bit, and what a format cannot express is an error."""

import json
import shutil
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from mythos_jax.errors import ConfigError
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.convert import convert, format_report, report_as_json
from mythos_jax.porting.pretrained import load_pretrained, save_pretrained
from mythos_jax.porting.reading import VariablesSource
from mythos_jax.porting.torch_files import TorchFile
from tests import tiny
from tests.porting import golden

all_models = pytest.mark.parametrize("name", golden.NAMES)


def read_tensors(directory):
    """Those of the model; not the table of RoPE that Huginn and Parcae store."""
    if (directory / "pytorch_model.bin").is_file():
        file = TorchFile(directory / "pytorch_model.bin")
        tensors = {name: np.array(file.read(name)) for name in file.tensors}
    else:
        tensors = {k: v for file in sorted(directory.glob("model*.safetensors")) for k, v in load_file(file).items()}
    return {name: array for name, array in tensors.items() if name != "freqs_cis"}


def in_float32(tensors):
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert array.dtype == expected[name].dtype
        assert array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes(), name


@all_models
def test_load_and_save(name, tmp_path):
    config, variables = golden.load(name)
    save_pretrained(tmp_path / "back", config, variables, golden.FAMILY[name])
    assert_same_bits(read_tensors(tmp_path / "back"), in_float32(read_tensors(golden.FOLDER / name)))
    again, _ = load_pretrained(tmp_path / "back")
    assert again == config
    assert not {"family", "tied"} & json.loads((tmp_path / "back" / "config.json").read_text()).keys()


@all_models
def test_convert_round_trip(name, tmp_path):
    family = golden.FAMILY[name]
    to_ours = convert(golden.FOLDER / name, tmp_path / "ours", "mythos_jax", progress=False)
    back = convert(tmp_path / "ours", tmp_path / "back", family, progress=False)
    original = read_tensors(golden.FOLDER / name)
    assert_same_bits(read_tensors(tmp_path / "back"), original)
    assert to_ours.ok
    assert to_ours.coverage.used == len(original) == len(back.written.tensors.keys() - {"freqs_cis"})
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["family"] == "mythos_jax"
    # The fields of the source come back, also those that we do not use; its code is not beside it.
    source = {key: value for key, value in golden.fields(name).items() if key not in ("family", "tied", "auto_map")}
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in source} == source
    _, variables = golden.load(name)
    assert_same_bits(
        {k: np.asarray(v) for k, v in flatten_dict(variables, sep=".").items()},
        in_float32(read_tensors(tmp_path / "ours")),
    )
    count = sum(a.size for k, a in original.items() if not k.endswith("router_bias"))
    assert f"parameters: {count:,}" in format_report(to_ours)
    assert json.loads(json.dumps(report_as_json(to_ours)))["parameters"] == count


def test_shards_and_stored_dtypes(tmp_path):
    """bfloat16 stays bfloat16, and many small shards hold the same tensors as one file."""
    source = tmp_path / "bf16"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(golden.fields("huginn")))
    (source / "tokenizer.json").write_text("{}")
    low = {k: v.astype(ml_dtypes.bfloat16) for k, v in read_tensors(golden.FOLDER / "huginn").items()}
    save_file(low, source / "model.safetensors")
    convert(source, tmp_path / "ours", "mythos_jax", shard_bytes=50_000, progress=False)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 3
    report = convert(tmp_path / "ours", tmp_path / "back", "huginn", progress=False)
    assert_same_bits(read_tensors(tmp_path / "back"), low)
    assert report.written.copied == ["tokenizer.json"]
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    _, variables = load_pretrained(tmp_path / "ours")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_tied_head_under_both_names(tmp_path):
    source = tmp_path / "both"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(golden.fields("openmythos_gqa")))
    both = read_tensors(golden.FOLDER / "openmythos_gqa")
    both["head.weight"] = both["embed.weight"].copy()
    both["freqs_cis"] = np.cos(np.arange(4)[:, None] * 500_000.0 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)
    save_file(both, source / "model.safetensors")
    report = convert(source, tmp_path / "ours", "mythos_jax", progress=False)
    assert report.ok
    assert report.coverage.tied == ["head.weight"]
    assert report.coverage.buffers == ["freqs_cis"]

    both["head.weight"][3, 3] += 1
    save_file(both, source / "model.safetensors")
    with pytest.raises(ConfigError, match=r"head\.weight: differs from embed\.weight"):
        load_pretrained(source)

    del both["embed.weight"]
    save_file(both, source / "model.safetensors")
    _, variables = load_pretrained(source)
    np.testing.assert_array_equal(variables["params"]["embedding"], both["head.weight"])


@pytest.mark.parametrize("config", [tiny.GQA, tiny.MLA, tiny.HUGINN, tiny.PARCAE], ids=lambda c: c.injection)
def test_our_format_keeps_every_config(config, tmp_path):
    variables = tiny.variables(config)
    save_pretrained(tmp_path / "model", config, variables)
    again, loaded = load_pretrained(tmp_path / "model")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_boxed_variables_are_unboxed(tmp_path):
    config = tiny.HUGINN
    boxed = jax.jit(Mythos(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    save_pretrained(tmp_path / "model", config, boxed)
    _, loaded = load_pretrained(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded, nn.unbox(boxed))


def test_all_inexpressible_features_are_listed(tmp_path):
    config, variables = golden.load("openmythos_gqa")
    repaired = replace(config, act_remainder=True, freeze_halted=True, state_norm=True, loop_embedding_scale=0.5)
    with pytest.raises(ConfigError, match="openmythos cannot express") as error:
        save_pretrained(tmp_path / "out", repaired, variables, "openmythos")
    assert "\n" not in str(error.value)
    for name in ("act_remainder: true", "freeze_halted: true", "state_norm: true", "loop_embedding_scale: 0.5"):
        assert f"model.{name}" in str(error.value)
    assert str(error.value).count("model.") == 4
    assert list(tmp_path.iterdir()) == []


def test_families_cannot_express_each_other(tmp_path):
    for name in golden.OURS:
        config, variables = golden.load(name)
        for family in {golden.FAMILY[other] for other in golden.OURS} - {golden.FAMILY[name]}:
            with pytest.raises(ConfigError, match=r"cannot express.*model\.injection"):
                save_pretrained(tmp_path / "out", config, variables, family)
    with pytest.raises(ConfigError, match="format: got 'gguf', allowed: mythos_jax_int8, mythos_jax, openmythos"):
        save_pretrained(tmp_path / "out", config, variables, "gguf")


def test_existing_paths_are_refused(tmp_path):
    config, variables = golden.load("huginn")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="exists already; allowed: a new path or an empty directory"):
        save_pretrained(tmp_path, config, variables, "huginn")
    with pytest.raises(ConfigError, match="exists already"):
        convert(golden.FOLDER / "huginn", tmp_path, "mythos_jax")
    with pytest.raises(ConfigError, match="name of a file"):
        convert(golden.FOLDER / "huginn", tmp_path / "model.safetensors", "mythos_jax")


def test_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mythos_jax.porting.writing.save_file", disk_full)
    config, variables = golden.load("huginn")
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path / "out", config, variables)
    assert list(tmp_path.iterdir()) == []


def test_model_in_memory_is_converted(tmp_path):
    config, variables = golden.load("parcae")
    report = convert(VariablesSource(config, variables, "runs/x"), tmp_path / "out", "parcae", progress=False)
    assert report.ok
    assert "runs/x (mythos_jax) -> " in format_report(report)
    assert_same_bits(read_tensors(tmp_path / "out"), read_tensors(golden.FOLDER / "parcae"))


def test_variables_that_do_not_fit_the_config(tmp_path):
    config, variables = golden.load("huginn")
    with pytest.raises(ConfigError, match=r"variables: its tensors do not fit its config .*missing: params\.coda_1"):
        save_pretrained(tmp_path / "out", replace(config, coda_layers=2), variables)


def test_a_router_bias_that_the_file_lacks_is_zeros(tmp_path, caplog):
    """It is a buffer of the original, which `named_parameters()` leaves out."""
    name = "recurrent.block.ffn.router_bias"
    shutil.copytree(golden.FOLDER / "openmythos_gqa", tmp_path / "model")
    tensors = read_tensors(tmp_path / "model")
    bias = tensors.pop(name)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with caplog.at_level("INFO"):
        load_pretrained(tmp_path / "model")
    assert f"not in the file, zeros here: {name}" in caplog.text
    report = convert(tmp_path / "model", tmp_path / "out", "mythos_jax", progress=False)
    assert f"not in the file, zeros here: {name}" in format_report(report)
    (ours,) = (array for path, array in read_tensors(tmp_path / "out").items() if path.startswith("balance."))
    np.testing.assert_array_equal(ours, np.zeros_like(bias))
