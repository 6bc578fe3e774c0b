"""Names that PyTorch's wrappers have been put into, and files that git has not downloaded."""

import shutil
import struct
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.porting.convert import convert, format_report
from mythos_jax.porting.pretrained import load_pretrained
from mythos_jax.porting.reading import FileSource
from tests.porting import golden

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


def inner(name, part):
    """The name with a part after its first module, as where one block is wrapped."""
    first, dot, rest = name.partition(".")
    return f"{first}.{part}{rest}" if dot else f"{part}{name}"


WRAPPED = {
    "compiled": (lambda name: f"_orig_mod.{name}", ["_orig_mod."]),
    "DDP of compiled": (lambda name: f"module._orig_mod.{name}", ["module.", "_orig_mod."]),
    "compiled twice": (lambda name: f"_orig_mod._orig_mod.{name}", ["_orig_mod."]),
    "compiled blocks": (lambda name: inner(name, "_orig_mod."), ["_orig_mod."]),
    "FSDP, checkpointed": (
        lambda name: f"_fsdp_wrapped_module.{inner(name, '_checkpoint_wrapped_module.')}",
        ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module."],
    ),
    "Fabric": (lambda name: f"_forward_module._original_module.{name}", ["_forward_module.", "_original_module."]),
    "Lightning": (lambda name: f"model.{name}", ["model."]),
    "Lightning, another attribute": (lambda name: f"lit.net.{name}", ["lit.", "net."]),
    "Lightning of compiled": (lambda name: f"model._orig_mod.{name}", ["_orig_mod.", "model."]),
}


@pytest.mark.parametrize("model", ["openmythos_gqa", "huginn", "llama", "llama_tied"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_off_names_in_safetensors(tmp_path, kind, model):
    wrap, said = WRAPPED[kind]
    shutil.copytree(golden.FOLDER / model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({wrap(name): array for name, array in tensors.items()}, file)
    source, plain = FileSource(tmp_path / "model"), FileSource(golden.FOLDER / model)
    assert list(source.wrappers) == said
    assert plain.wrappers == []
    assert source.tensors == plain.tensors
    for name in tensors:
        np.testing.assert_array_equal(source.read(name), plain.read(name))


def test_wrappers_are_taken_off_names_in_a_checkpoint_of_pytorch(tmp_path):
    whole = golden.FOLDER / "openmythos_trainer" / "checkpoint.pt"
    plain, wrapped = FileSource(whole), tmp_path / "wrapped.pt"

    def pickled(name):
        return b"X" + struct.pack("<I", len(name)) + name.encode()

    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(wrapped, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                for name in plain.tensors:
                    assert pickled(name) in data
                    data = data.replace(pickled(name), pickled(f"module.{inner(name, '_orig_mod.')}"))
            new.writestr(item.filename, data)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(wrapped)[1], load_pretrained(whole)[1])
    report = convert(wrapped, tmp_path / "out", "mythos_jax", progress=False)
    assert report.ok
    assert "taken off the tensors' names: module., _orig_mod." in format_report(report)


def test_a_model_among_other_modules_of_lightning(tmp_path):
    """A second model is left out, and said to be; tensors of other modules are named."""
    shutil.copytree(golden.FOLDER / "llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {f"model.{name}": array for name, array in load_file(file).items()}
    averages = {f"ema_{name}": array + 1 for name, array in tensors.items()}
    save_file(tensors | averages, file)
    report = convert(tmp_path / "model", tmp_path / "out", "mythos_jax", progress=False)
    assert report.ok
    assert "read: the tensors under model.; left: those under ema_model." in format_report(report)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "out")[1], golden.load("llama")[1])
    save_file(tensors | {"loss.weight": np.ones(3, np.float32)}, file)
    with pytest.raises(ConfigError, match=r"do not fit its config \(llama\): unexpected: loss\.weight$"):
        load_pretrained(tmp_path / "model")


def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path):
    shutil.copytree(golden.FOLDER / "openmythos_gqa", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"_orig_mod.norm.weight": tensors["norm.weight"]}, file)
    with pytest.raises(ConfigError, match=r"holds both \S*norm\.weight and \S*norm\.weight, allowed: one of them"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "config.json"])
def test_a_pointer_of_git_lfs_says_so(tmp_path, name):
    shutil.copytree(golden.FOLDER / "openmythos_gqa", tmp_path / "model")
    if name == "model.pt":
        (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(POINTER)
    with pytest.raises(ConfigError, match=rf"{name}: is a Git LFS pointer, not \w+; run `git lfs pull`"):
        load_pretrained(tmp_path / "model")


def test_a_tokenizer_that_is_a_pointer_of_git_lfs_says_so(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is a Git LFS pointer; run `git lfs pull`"):
        load_tokenizer(tmp_path / "tokenizer.json")
