"""A run carries its tokenizer, and its weights are never used with another one."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from mythos_jax import cli
from mythos_jax.data.open import open_data
from mythos_jax.data.prepare import prepare
from mythos_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from mythos_jax.errors import ConfigError, DamagedError
from mythos_jax.language_model import load
from mythos_jax.runs.load import _tokenizer_of, load_model, open_source
from mythos_jax.runs.trained_on import TrainedOn
from mythos_jax.training import start, train
from mythos_jax.training.predictor import save_predictor, train_predictor
from mythos_jax.training.resume import checkpoint_metadata
from tests.training.conftest import config_of


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A copy of `home` as the working directory."""
    copy = shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(copy)
    return copy


def prepare_anew(tokenizer="other.json", seq_len=16):
    shutil.rmtree("data/c")
    prepare(["text"], "data/c", tokenizer=tokenizer, seq_len=seq_len, held_out_fraction=0.2, progress=False)


def refusal(call, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def test_a_run_copied_elsewhere_generates_and_evaluates(here, tmp_path, monkeypatch):
    lm = load("run")
    text, loss = lm.generate("document", max_new_tokens=4), lm.evaluate().results[0].loss
    (tmp_path / "elsewhere").mkdir()
    shutil.move("run", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = load("moved")
    assert moved.tokenizer.fingerprint == load_tokenizer(here / "own.json").fingerprint
    assert moved.generate("document", max_new_tokens=4) == text
    assert moved.evaluate(here / "data" / "c").results[0].loss == loss
    missing = "moved: its data is not here (there is no prepared folder data/c); allowed: "
    assert refusal(moved.evaluate).startswith(missing)
    assert refusal(train_predictor, moved.loaded, rows=8, progress=False).startswith(missing)
    assert open_source("moved").tokenizer.read_bytes() == (tmp_path / "elsewhere/moved/tokenizer.json").read_bytes()


def test_data_prepared_anew_with_another_tokenizer_is_refused(here, capsys):
    text = load("run").generate("document", max_new_tokens=4)
    prepare_anew()
    assert load("run").generate("document", max_new_tokens=4) == text
    different = "data/c: prepared with a different tokenizer from the model's: other.json, the model was trained with "
    assert refusal(load("run").evaluate) == different + "own.json"
    assert refusal(load("run").evaluate, "data/c") == different + "own.json"
    assert "with which data/c was prepared" in refusal(train_predictor, load_model("run"), rows=8, progress=False)
    capsys.readouterr()
    assert cli.main(["eval", "run", "--mesh.data", "1"]) == 2
    assert capsys.readouterr().err == f"mythos: {different}own.json\n"


def test_data_prepared_anew_with_another_length_is_refused_and_other_text_is_announced(here, capsys):
    prepare_anew("own.json", seq_len=8)
    assert refusal(load("run").evaluate) == "data/c: prepared anew with seq_len 8, allowed: the run's, 16"
    (here / "text" / "zz.txt").write_text("more text\n" * 100)
    prepare_anew("own.json")
    load("run").evaluate()
    assert "data/c: prepared anew since the run was trained; these are other rows" in capsys.readouterr().err


def test_the_tokenizer_in_the_run_is_checked(here):
    file = here / "run" / "tokenizer.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert "run/tokenizer.json: not JSON" in refusal(load("run").generate, "a")
    shutil.copyfile("other.json", file)
    assert "run/tokenizer.json: is not the tokenizer that the model was trained with, own.json" in refusal(
        load("run").generate, "a"
    )
    file.write_text(json.dumps(json.loads(whole), indent=4))  # formatting does not matter
    load("run").generate("a", max_new_tokens=1)
    file.unlink()
    load("run").generate("a", max_new_tokens=1)  # from the data
    shutil.rmtree("data")
    assert refusal(load("run").generate, "a").startswith("run/tokenizer.json: missing; allowed: the tokenizer that")
    assert refusal(lambda: load("run", tokenizer="bytes").tokenizer).startswith("tokenizer bytes: is not the tokenizer")
    assert load("run", tokenizer="own.json").tokenizer.vocab_size == 264


def test_a_run_of_an_older_version_uses_the_tokenizer_of_its_data_only_if_that_is_the_same(here, capsys):
    shutil.copytree("run", "old")
    (here / "old" / "tokenizer.json").unlink()
    (meta,) = (file for file in (here / "old" / "checkpoints" / "2" / "meta").iterdir() if "digest" in file.read_text())
    fields = json.loads(meta.read_text())
    del fields["tokenizer"], fields["digest"]
    meta.write_text(json.dumps(fields))
    text = load("run").generate("document", max_new_tokens=4)
    capsys.readouterr()
    assert load("old").generate("document", max_new_tokens=4) == text
    assert "old/tokenizer.json: missing; using data/c/tokenizer.json" in capsys.readouterr().err
    prepare_anew()
    assert "has no tokenizer.json, because an older version trained it" in refusal(load("old").generate, "a")
    assert "prepared anew since the run was trained, which did not keep its tokenizer" in refusal(load("old").evaluate)
    assert load("old", tokenizer="own.json").generate("document", max_new_tokens=4) == text


def test_weights_of_another_tokenizer_are_no_start(here, monkeypatch):
    other = replace(config_of(), data=replace(config_of().data, tokenizer="other.json"))
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:2])
    message = refusal(train.train, other, "next", progress=False, init_from="run")
    assert message.startswith("data.tokenizer: got other.json, allowed: the tokenizer of run, run/tokenizer.json")
    same = replace(config_of(), training=replace(config_of().training, init_from="run"))
    assert start.load_initial(same, here / "next") is not None


def test_a_run_on_bytes_remembers_them(here):
    prepare(["text"], "data/b", seq_len=16, held_out_fraction=0.2, progress=False)
    config = config_of(path="data/b", tokenizer="bytes")
    record = checkpoint_metadata(config, open_data(config))["tokenizer"]
    assert record == {"name": "bytes", "fingerprint": ByteTokenizer.fingerprint, "end_of_document": 256}
    remembered = TrainedOn.from_metadata({"data": "x", "tokenizer": record})
    assert _tokenizer_of(here / "run", config_of(), remembered) == "bytes"  # although there is a tokenizer.json
    assert "is not the tokenizer that the model was trained with, bytes" in refusal(
        remembered.check_tokenizer, load_tokenizer("own.json"), "own.json"
    )


def test_a_damaged_predictor_can_be_recreated(here):
    (here / "run" / "predictor").mkdir()
    (here / "run" / "predictor" / "predictor.json").write_text("{")
    assert "predictor: damaged" in refusal(load, "run")
    assert load_model("run", with_predictor=False).step == 2


def test_all_that_is_loaded_is_on_the_mesh(here):
    save_predictor(here / "run", {"budget": np.float32([2])}, {"step": 2})
    run = load_model("run")
    assert run.variables["predictor"]["budget"] == 2
    assert {x.sharding.mesh for x in jax.tree.leaves(run.variables)} == {run.mesh}


@pytest.mark.parametrize("meta", [{"data": {"mixture": [1]}}, {"data": "x", "tokenizer": {"name": "bytes"}}])
def test_metadata_that_are_not_those_of_a_run_are_damaged(meta):
    with pytest.raises(DamagedError, match="meta is damaged"):
        TrainedOn.from_metadata(meta)


def test_files_that_are_missing_in_a_checkpoint_are_one_line(here):
    """Also when Python ends while the other files are still being read."""
    shutil.rmtree("run/checkpoints/2/model/d")
    command = [sys.executable, "-m", "mythos_jax", "generate", "run", "a", "--mesh.data", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"mythos: {here}/run/checkpoints/2: damaged, cannot be restored (")
