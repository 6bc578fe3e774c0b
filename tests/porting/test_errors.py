"""Each kind of invalid file gives one clear line, and nothing is written."""

import contextlib
import json
import math
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mythos_jax.errors import ConfigError
from mythos_jax.porting.convert import convert, format_report
from mythos_jax.porting.families import FAMILIES, detect
from mythos_jax.porting.pretrained import load_pretrained
from mythos_jax.porting.reading import FileSource
from tests.porting import golden

CHECKPOINT = golden.FOLDER / "openmythos_trainer" / "checkpoint.pt"


@pytest.fixture
def model(tmp_path):
    """A copy of a golden model that a test may damage."""
    shutil.copytree(golden.FOLDER / "openmythos_gqa", tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def edit_fields(model, **fields):
    """Sets fields of the model's config.json; `...` deletes one."""
    path = model / "config.json"
    merged = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in merged.items() if value is not ...}))


def assert_refused(path, match, **keywords):
    with pytest.raises(ConfigError, match=match) as error:
        load_pretrained(path, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 200, 20_000, -4])
def test_truncated_safetensors(model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in assert_refused(model, "damaged or truncated safetensors")


def test_renamed_tensor(model):
    edit_tensors(model, lambda t: t.update({"coda.0.attn.wx.weight": t.pop("coda.0.attn.wq.weight")}))
    assert_refused(model, r"missing: coda\.0\.attn\.wq\.weight; unexpected: coda\.0\.attn\.wx\.weight")
    report = convert(model, model.parent / "out", "mythos_jax", progress=False)
    assert not report.ok
    text = format_report(report)
    assert "missing: coda.0.attn.wq.weight" in text
    assert "unexpected: coda.0.attn.wx.weight" in text
    assert "nothing was written" in text
    assert os.listdir(model.parent) == ["model"]


def test_transposed_tensor(model):
    name = "prelude.0.ffn.up.weight"
    edit_tensors(model, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    assert_refused(model, r"prelude\.0\.ffn\.up\.weight: shape \[64, 85\], expected \[85, 64\] \(it looks transposed\)")


def test_float8_tensor(model):
    edit_tensors(model, lambda t: t.update({"norm.weight": np.ones(64, ml_dtypes.float8_e4m3fn)}))
    assert_refused(model, r"norm\.weight: dtype float8_e4m3fn, allowed: float16, bfloat16, float32, float64")


def test_integer_tensor(model):
    edit_tensors(model, lambda t: t.update({"norm.weight": np.ones(64, np.int32)}))
    assert_refused(model, r"norm\.weight: dtype int32, allowed: float16, bfloat16, float32, float64")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_type": "MLA"}, "config.json: attn_type: got 'MLA', allowed: gqa, mla"),
        ({"dim": "64"}, "config.json: dim: got '64', allowed: an integer"),
        ({"dim": 96}, r"embed\.weight: shape \[112, 64\], expected \[112, 96\]"),
        ({"n_heads": 5}, r"config.json: model\.n_heads: got 5, allowed: a divisor of dim 64"),
        ({"n_experts": 8}, r"missing: recurrent\.block\.ffn\.routed_experts\.6\.gate\.weight"),
        ({"coda_layers": ..., "codalayers": 2}, "config.json: codalayers: unknown field; did you mean coda_layers?"),
        ({"n_heads": ...}, "config.json: n_heads: missing"),
        ({"family": "gpt2"}, "config.json: family: got 'gpt2', allowed: mythos_jax_int8, mythos_jax, openmythos"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_config_field(model, fields, message):
    edit_fields(model, **fields)
    assert_refused(model, message)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("parcae", {"init_strategy": "takase"}, "init_strategy: got 'takase', allowed: scaled-zero, scaled"),
        ("huginn", {"injection_type": "add"}, "injection_type: got 'add', allowed: 'linear'"),
        ("huginn", {"state_init": "unit"}, "state_init: got 'unit', allowed: like-init, zero"),
        ("parcae", {"qk_bias": True}, "qk_bias: got True, allowed: False"),
        ("parcae", {"logit_softcap": 15.0}, "logit_softcap: got 15.0, allowed: None"),
        ("parcae", {"rope_settings": {"use_rope": False}}, "rope_settings: use_rope: got False, allowed: True"),
        ("parcae", {"mean_backprop_depth": 2}, r"missing: transformer\.prelude\.1\.attn\.ve_gate\.weight"),
    ],
)
def test_unsupported_variants(name, fields, message, tmp_path):
    shutil.copytree(golden.FOLDER / name, tmp_path / "model")
    edit_fields(tmp_path / "model", **fields)
    assert_refused(tmp_path / "model", message)


ODD = [None, True, 0, -1, 10**30, 1e308, math.nan, math.inf, "", "x", [], ["x"], [[]], {}, {"rope_type": []}]


@pytest.mark.parametrize("name", ["openmythos_gqa", "huginn", "parcae", "raven_llama", "nanbeige", "ouro"])
def test_any_value_in_a_config_is_taken_or_refused_in_one_line(name):
    """Each field in turn; none makes the reader fail, hang, or fill the memory."""
    fields, family, messages = golden.fields(name), FAMILIES[golden.FAMILY[name]], []
    for field in sorted({*fields, *family.config_fields, "family"}):
        for value in ODD:
            changed = {**fields, field: value}
            with contextlib.suppress(ConfigError):
                detect(changed, [], "config.json")
            try:
                family.model_config(changed, "config.json")
            except ConfigError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert [m for m in messages if not m.startswith("config.json: ") or "\n" in m] == []
    with pytest.raises(ConfigError, match=r"family: got \['x'\], allowed: mythos_jax_int8, mythos_jax"):
        detect({"family": ["x"]}, [], "config.json")


@pytest.mark.parametrize("name", golden.NAMES)
def test_family_is_detected_without_its_name(name, tmp_path):
    shutil.copytree(golden.FOLDER / name, tmp_path / "model")
    edit_fields(tmp_path / "model", family=..., tied=...)
    config, _ = load_pretrained(tmp_path / "model")
    assert config == golden.load(name)[0]


def test_file_of_tensors_needs_a_config(model):
    path = model / "model.safetensors"
    assert_refused(path, "holds only tensors")
    config = golden.load("openmythos_gqa")[0]
    for config_like in (config, golden.fields("openmythos_gqa"), model / "config.json"):
        assert load_pretrained(path, config=config_like)[0] == config


def test_directories_without_a_model(tmp_path, model):
    assert_refused(tmp_path / "none", "no such file or directory")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "got weight files: none")
    (model / "config.json").write_text("{")
    assert_refused(model, "config.json: not JSON")
    (model / "config.json").unlink()
    assert_refused(model, "holds only tensors")


def test_missing_shard(model, tmp_path):
    convert(model, tmp_path / "shards", "openmythos", shard_bytes=100_000, progress=False)
    missing = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    missing.unlink()
    assert_refused(tmp_path / "shards", f"names shard {missing.name}, which is missing")


@pytest.mark.parametrize("name", ["./{}", "sub/{}", "sub/../{}", "../model/{}", "{absolute}", "C:\\{}", ""])
def test_shards_in_an_index(model, tmp_path, name):
    """Names are those of files in the directory or below it."""
    weights = model / "model.safetensors"
    (model / "sub").mkdir()
    shutil.copy(weights, model / "sub" / weights.name)
    name = name.format(weights.name, absolute=weights)
    weight_map = dict.fromkeys(load_file(weights), name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if name.startswith(("./", "sub/m")):
        assert FileSource(model).config == golden.load("openmythos_gqa")[0]
        assert FileSource(model / "model.safetensors.index.json", model / "config.json").path.name.endswith(".json")
    else:
        assert_refused(model, "got shard .*, allowed: names of files in the same directory")


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.pt", "a.bin"])
def test_a_checkpoint_of_any_suffix_in_a_directory(tmp_path, name):
    """Its config is in it; a trainer's other files are not weights."""
    shutil.copy(CHECKPOINT, tmp_path / name)
    for other in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
        (tmp_path / other).write_bytes(b"x")
    assert FileSource(tmp_path).config == FileSource(CHECKPOINT).config
    (tmp_path / "b.pth").write_bytes(b"x")
    assert_refused(tmp_path, f"got weight files: {name}, b.pth, allowed: one of them")


def test_a_directory_with_two_formats(model, caplog):
    """The preferred one is read, and a line says which was left."""
    shutil.copy(CHECKPOINT, model / "pytorch_model.bin")
    report = convert(model, model.parent / "out", "mythos_jax", progress=False)
    assert f"{model}: read: model.safetensors; left: pytorch_model.bin" in format_report(report)
    (model / "model.safetensors").rename(model / "a.safetensors")
    (model / "pytorch_model.bin").rename(model / "a.gguf")
    with caplog.at_level("INFO"):
        load_pretrained(model)
    assert f"{model}: read: a.safetensors; left: a.gguf" in caplog.text
    (model / "a.gguf").rename(model / "b.gguf")
    assert_refused(model, r"got weight files: a\.safetensors, b\.gguf, allowed: one of them")


def test_deepspeed_directories(tmp_path):
    """Weights that are whole are read, those of stage 3 are called by name; `latest` chooses the step."""
    for step in (1, 2):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / "mp_rank_00_model_states.pt").write_bytes(CHECKPOINT.read_bytes())
        (tmp_path / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    assert_refused(tmp_path, r"got global_step1, global_step2, allowed: one of them")
    (tmp_path / "latest").write_text("global_step2\n")
    source = FileSource(tmp_path)
    assert source.config == FileSource(CHECKPOINT).config
    assert "global_step2/mp_rank_00_model_states.pt: the weights that the model computed with" in source.notes[0]
    (tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")
    (tmp_path / "zero_to_fp32.py").write_bytes(b"")
    message = rf"the part of one process of divided weights, .*: python {tmp_path}/zero_to_fp32\.py {tmp_path} OUT"
    assert_refused(tmp_path, message)
    assert_refused(tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt", message)


def test_hub_id_while_offline(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert_refused("nobody/no-such-model", "cannot be fetched from the Hugging Face hub .*no network")


def test_hub_id_is_downloaded(monkeypatch):
    """Where the hub has safetensors files, no other weights are requested."""
    requested = {}

    def snapshot_download(repository, **keywords):
        requested.update(keywords)
        return str(golden.FOLDER / "huginn")

    files = [SimpleNamespace(rfilename=name) for name in ("model.safetensors", "pytorch_model.bin", "config.json")]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_: SimpleNamespace(siblings=files))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_pretrained("someone/huginn")[0] == golden.load("huginn")[0]
    assert {"*.json", "*.jinja", "*.py", "*.safetensors"} <= {*requested["allow_patterns"]}
    assert "*.bin" not in requested["allow_patterns"]


# Pickles.


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.999])
def test_truncated_checkpoint(tmp_path, fraction):
    data = CHECKPOINT.read_bytes()
    path = tmp_path / "truncated.pt"
    path.write_bytes(data[: int(fraction * len(data))])
    assert str(path) in assert_refused(path, "damaged checkpoint|not a PyTorch checkpoint")


def test_flipped_bits_in_checkpoint(tmp_path):
    data = bytearray(CHECKPOINT.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    assert_refused(path, "damaged checkpoint")


def test_tensor_that_extends_beyond_its_storage(tmp_path):
    """A view larger than its storage would read memory that does not belong to the file."""
    path = tmp_path / "beyond.pt"
    with zipfile.ZipFile(CHECKPOINT) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item.filename, data[:16] if "/data/" in item.filename else data)
    assert_refused(path, "extends beyond its storage")


def test_the_config_of_another_family_is_refused(tmp_path):
    """The tensors say that they are Huginn's; a config of ours says what these cannot be."""
    config = tmp_path / "other.yaml"
    config.write_text("model: {vocab_size: 120, dim: 32, n_heads: 2, n_kv_heads: 2}\n", encoding="utf-8")
    weights = Path(__file__).parents[1] / "golden" / "huginn" / "model.safetensors"
    with pytest.raises(ConfigError, match=r"other\.yaml: is not the config of .*, whose tensors are those of a huginn"):
        load_pretrained(weights, config)
