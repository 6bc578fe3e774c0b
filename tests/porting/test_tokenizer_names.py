"""A tokenizer is named as a model is: by a path, the word of a package, or a hub id."""

import sys
from types import SimpleNamespace

import pytest

from mythos_jax.config import Config, DataConfig
from mythos_jax.data.manifest import load_manifest
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.porting.hub import PACKAGED, local_tokenizer
from mythos_jax.training import start
from mythos_jax.training import train as train_module
from tests.chats import run, write_model
from tests.porting.test_gguf import TINY


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package with a small model under the word smollm2."""
    name, file, _ = PACKAGED["smollm2"]
    package = tmp_path / "path" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / file).write_bytes(TINY.read_bytes())
    monkeypatch.syspath_prepend(package.parent)
    return package / file


def prepared(tmp_path, spec):
    (tmp_path / "text.txt").write_text("the rain " * 50)
    out = tmp_path / f"out {spec}".replace("/", "_")
    assert run("data", "prepare", tmp_path / "text.txt", "--tokenizer", spec, "--out", out, "--seq-len", 8) == 0
    return load_manifest(out)


def test_a_word_and_a_file(packaged, tmp_path):
    assert prepared(tmp_path, "smollm2").fingerprint == prepared(tmp_path, TINY).fingerprint


def test_a_hub_id_without_the_weights(tmp_path, monkeypatch):
    requested = {}

    def download(repository, **keywords):
        requested.update(keywords, repository=repository)
        return str(write_model(tmp_path / "model"))

    files = [SimpleNamespace(rfilename=name) for name in ("model.safetensors", "tokenizer.json")]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    manifest = prepared(tmp_path, "some-one/some-model")
    assert manifest.tokenizer_fingerprint == load_tokenizer(tmp_path / "model").fingerprint
    assert requested["repository"] == "some-one/some-model"
    assert not {"*.safetensors", "*.bin"} & {*requested["allow_patterns"]}


def test_other_names_are_as_they_are(tmp_path):
    for name in ["bytes", "nowhere.json", str(tmp_path / "no/where"), "gs://bucket/tokenizer.json"]:
        assert local_tokenizer(name) == name


def test_a_run_is_given_the_file(packaged, tmp_path, monkeypatch):
    """Its config keeps the word."""

    class Seen(Exception):
        pass

    def open_data(config, *_, **keywords):
        raise Seen(config.data.tokenizer)

    monkeypatch.setattr(start, "open_data", open_data)
    config = Config(data=DataConfig(tokenizer="smollm2", sources=("stdlib",)))
    with pytest.raises(Seen, match=str(packaged)):
        train_module.train(config, tmp_path / "run", progress=False)
    monkeypatch.setattr("sys.path", [path for path in sys.path if str(tmp_path) not in path])
    with pytest.raises(ConfigError, match="smollm2: this model comes as a Python package that is not installed"):
        train_module.train(config, tmp_path / "run", progress=False)
