"""What `convert` writes is complete: the originals' own loaders find what they look for (tests_torch/originals.py)."""

import json
import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mythos_jax.cli import main
from mythos_jax.data.conventions import documents, read_conventions
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.porting.convert import convert, format_report, report_as_json
from mythos_jax.porting.families import get_family
from mythos_jax.porting.pretrained import save_pretrained
from mythos_jax.porting.reading import FileSource, VariablesSource
from mythos_jax.porting.torch_files import TorchFile
from mythos_jax.porting.torch_writer import TorchWriter
from tests.porting import golden
from tests.porting.test_gguf import TINY

PARTS = {
    "tokenizer.json": '{"a": 1}',
    "tokenizer_config.json": '{"bos_token": "<s>", "auto_map": {"AutoTokenizer": ["own_tokenizer.Own", null]}}',
    "special_tokens_map.json": "{}",
    "generation_config.json": '{"bos_token_id": 1}',
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "as you like",
    "raven_modeling_minimal.py": "from .raven_config_minimal import RavenConfig\n",
    "raven_config_minimal.py": "import torch\n",
    "own_tokenizer.py": "",
}
MADE = ["tokenizer_config.json", "generation_config.json"]
OTHERS = {"README.md": "# Of another file", "training_args.bin": "x", "unused.py": ""}
AUTO_MAP = {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"}


def fields_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.fixture
def huginn(tmp_path):
    """A directory as on the hub: with code, tokenizer, a stored table, a padded vocabulary, fields of its own."""
    source = tmp_path / "huginn"
    source.mkdir()
    for name, text in {**PARTS, **OTHERS}.items():
        (source / name).write_text(text)
    fields = {key: value for key, value in golden.fields("huginn").items() if key not in ("family", "tied")}
    fields |= {"vocab_size": 100, "mean_backprop_depth": 3, "sampling_scheme": "fixed", "my_note": "kept"}
    (source / "config.json").write_text(json.dumps({**fields, "auto_map": AUTO_MAP, "eos_token_id": 5}))
    tensors = load_file(golden.FOLDER / "huginn" / "model.safetensors")
    config, _ = golden.load("huginn")
    table = get_family("huginn").stored_buffers(config)["freqs_cis"]
    tensors["freqs_cis"] = np.nextafter(table, np.float32(2))
    save_file(tensors, source / "model.safetensors")
    return source


@pytest.mark.parametrize("through_ours", [True, False])
def test_everything_that_belongs_to_a_model_comes_along(huginn, tmp_path, through_ours):
    middle = huginn
    if through_ours:
        middle = tmp_path / "ours"
        assert convert(huginn, middle, "mythos_jax", progress=False).written.left == sorted(OTHERS)
        assert FileSource(middle).origin.family == "huginn"
    report = convert(middle, tmp_path / "back", "huginn", progress=False)
    assert report.written.copied == sorted(PARTS)
    for name, text in PARTS.items():
        assert (tmp_path / "back" / name).read_text() == text
    back, source = fields_of(tmp_path / "back"), fields_of(huginn)
    assert {key: back[key] for key in source} == source
    assert back["dtype"] == back["torch_dtype"] == "float32"
    tables = [load_file(folder / "model.safetensors")["freqs_cis"] for folder in (huginn, tmp_path / "back")]
    np.testing.assert_array_equal(*tables)
    assert f"copied: {', '.join(sorted(PARTS))}" in format_report(report)
    assert report_as_json(report)["left"] == ([] if through_ours else sorted(OTHERS))


def test_without_its_code_the_published_one_is_named(huginn, tmp_path):
    (huginn / "raven_modeling_minimal.py").unlink()
    report = convert(huginn, tmp_path / "back", "huginn", progress=False)
    name = "tomg-group-umd/huginn-0125--raven_modeling_minimal.RavenForCausalLM"
    assert fields_of(tmp_path / "back")["auto_map"]["AutoModelForCausalLM"] == name
    assert "raven_config_minimal.py" not in report.written.copied  # nothing imports it
    assert report.written.notes == [
        f"config.json: not in {huginn}: raven_modeling_minimal.py; auto_map names the published code instead"
    ]


def test_a_model_that_is_not_the_sources_any_more(huginn, tmp_path):
    """Fields that may contradict the weights do not come back, and the report says so."""
    convert(huginn, tmp_path / "ours", "mythos_jax", progress=False)
    config = tmp_path / "ours" / "config.json"
    config.write_text(json.dumps({**fields_of(tmp_path / "ours"), "loops": 5, "rope_theta": 1e4}))
    report = convert(tmp_path / "ours", tmp_path / "back", "huginn", progress=False)
    assert report.written.notes[0].endswith("differs from its source in model.loops, model.rope_theta")
    back = fields_of(tmp_path / "back")
    assert (back["mean_recurrence"], back["vocab_size"], back["mean_backprop_depth"]) == (5, 120, 5)
    assert "my_note" not in back
    table = load_file(tmp_path / "back" / "model.safetensors")["freqs_cis"]
    np.testing.assert_allclose(table[0, 9, 0, :, 0], np.cos(9 / 1e4 ** (np.arange(8) / 8)), atol=1e-6)


@pytest.mark.parametrize("name", ["huginn", "parcae"])
def test_stored_table(name):
    """Cosines and sines of position times frequency, in float32, as wide as a head has pairs."""
    config, _ = golden.load(name)
    table = get_family(name).stored_buffers(config)["freqs_cis"]
    angles = np.arange(config.max_seq_len)[:, None] / 50_000 ** (np.arange(0, 16, 2) / 16)
    assert (table.dtype, table.shape) == (np.float32, (1, 64, 1, 8, 2))
    np.testing.assert_allclose(table[0, :, 0], np.stack([np.cos(angles), np.sin(angles)], -1), atol=1e-5)


def test_zeros_are_noise_of_no_deviation_to_the_released_classes():
    for name in ("huginn", "raven_llama"):
        config, _ = golden.load(name)
        family = get_family(golden.FAMILY[name])
        fields = family.config_json(replace(config, initial_state="zeros"))
        assert fields["init_values"]["std"] == 0
        again = family.model_config({**fields, "state_init": "like-init"}, "config.json")
        assert again.initial_state == "zeros"
    huginn = get_family("huginn")
    config, _ = golden.load("huginn")
    loud = replace(config, initial_noise_std=0.5)
    assert huginn.model_config(huginn.config_json(loud), "config.json") == loud
    with pytest.raises(ConfigError, match=r"embed_scale: got 1.0, allowed: 8, the square root of n_embd"):
        huginn.model_config({**huginn.config_json(config), "init_values": {"embed_scale": 1.0}}, "config.json")
    with pytest.raises(ConfigError, match=r"huginn cannot express model\.embedding_scale: 2\.0"):
        huginn.config_json(replace(config, embedding_scale=2.0))


def test_parcae_is_one_file_that_both_of_its_loaders_read(tmp_path):
    """`pytorch_model.bin`, however large, with the table; `ParcaeConfig(**config.json)` takes no other fields."""
    config, variables = golden.load("parcae")
    save_pretrained(tmp_path / "out", config, variables, "parcae", shard_bytes=1000)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "pytorch_model.bin"]
    file = TorchFile(tmp_path / "out" / "pytorch_model.bin")
    assert file.tensors["freqs_cis"].shape == (1, 64, 1, 8, 2)
    known = {*golden.fields("parcae")} - {"family", "tied"}
    assert fields_of(tmp_path / "out").keys() <= known


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 16])
def test_torch_file(limit, tmp_path, monkeypatch):
    """Records are aligned as PyTorch's are, in small files and in large ones, whose headers are longer."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    arrays = {"a": np.arange(20, dtype=np.float32).reshape(4, 5), "b": np.ones((), np.float16), "c": np.zeros((0, 3))}
    path = tmp_path / "x.bin"
    with TorchWriter(path) as file:
        for name, array in arrays.items():
            file.add(name, array)
    content = path.read_bytes()
    assert content.index(arrays["a"].tobytes()) % 64 == 0
    read = TorchFile(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read.read(name), array)
        assert (read.tensors[name].dtype, read.tensors[name].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("mounted", [False, True])
def test_an_empty_directory_is_filled(mounted, tmp_path, monkeypatch):
    config, variables = golden.load("huginn")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    # Nothing can be renamed onto a file system of its own, such as a container's volume.
    monkeypatch.setattr(os.path, "ismount", lambda path: mounted and str(path) == str(tmp_path / "out"))
    with monkeypatch.context() as broken:
        broken.delattr("mythos_jax.porting.writing.save_file")
        with pytest.raises(NameError):
            save_pretrained(tmp_path / "link", config, variables)
    assert os.listdir(tmp_path / "out") == []
    save_pretrained(tmp_path / "link", config, variables)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]
    with pytest.raises(ConfigError, match="exists already"):
        save_pretrained(tmp_path / "link", config, variables)


@pytest.mark.parametrize("to", ["llama", "mythos_jax"])
def test_a_gguf_file_becomes_a_directory_with_a_tokenizer(to, tmp_path, capsys):
    """Its text begins and ends as in the file; `AutoTokenizer` finds the names of the tokens."""
    assert main(["convert", str(TINY), str(tmp_path / "out"), "--to", to, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made"] == ["tokenizer.json", *MADE]
    tokenizer, vocab_size = load_tokenizer(TINY), golden.fields("llama")["vocab_size"]
    expected = read_conventions(TINY, tokenizer, None, vocab_size)
    out = tmp_path / "out"
    got = read_conventions(out / "tokenizer.json", load_tokenizer(out), out, vocab_size, "llama")
    assert got == expected
    name = "config.json" if to == "llama" else "source_config.json"
    fields = json.loads((out / name).read_text())
    ids = fields if to == "llama" else fields["config"]
    assert tokenizer.token_text(ids["bos_token_id"]) == expected.special_tokens["bos_token"]


def test_a_run_becomes_a_directory_with_a_tokenizer(tmp_path):
    """A text of a run starts with an end of document, which is what both names then mean."""
    config, variables = golden.load("llama")
    convert(TINY, tmp_path / "gguf", "llama", progress=False)
    file = tmp_path / "gguf" / "tokenizer.json"
    tokenizer = load_tokenizer(file)
    source = VariablesSource(config, variables, "run", file)
    source.text = tokenizer, documents(tokenizer)
    report = convert(source, tmp_path / "out", "llama", progress=False)
    assert (report.written.copied, report.written.made) == (["tokenizer.json"], MADE)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    end = tokenizer.end_of_document
    assert settings["bos_token"] == settings["eos_token"] == tokenizer.token_text(end)
    fields = fields_of(tmp_path / "out")
    assert fields["bos_token_id"] == fields["eos_token_id"] == end
    got = read_conventions(tmp_path / "out" / "tokenizer.json", tokenizer, tmp_path / "out", 128, "llama")
    assert (got.first_tokens, got.prefix_token) == ((end,), end)
