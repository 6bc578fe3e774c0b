"""Runs that start from a model: what a small config takes from it, and what the run keeps of it."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mythos_jax import load_config
from mythos_jax.cli import main
from mythos_jax.config import ModelConfig, load_run_config
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.inference.chat import Chat
from mythos_jax.porting.pretrained import save_pretrained
from mythos_jax.porting.reading import FileSource
from mythos_jax.runs.load import load_model
from mythos_jax.runs.source import keep_source
from tests import talker, tiny, tokenizer_kinds
from tests.survival import lines
from tests.tiny import TRAINED

LLAMA = ModelConfig(
    vocab_size=402,
    dim=16,
    max_seq_len=64,
    prelude_layers=0,
    loop_layers=1,
    coda_layers=0,
    loops=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    hidden_dim=24,
    injection="none",
    state_norm=False,
    readout="last",
    loop_embedding=False,
)
# A constant rate, so that runs of one and of two steps have the same program.
TRAINING = {"steps": 1, "batch_size": 8, "warmup_steps": 0, "schedule": "constant", "log_every": 1}


def small(file, config, init_from):
    """A config with no field of `model`."""
    data = {"path": config.data.path, "sources": list(config.data.sources), "seq_len": 16, "held_out_fraction": 0.2}
    file.write_text(yaml.safe_dump({"training": {"init_from": str(init_from), **TRAINING}, "data": data}))
    return file


def test_a_small_config_takes_its_model_from_a_run(config, uninterrupted, tmp_path, capsys):
    """Also when it goes on, although the source is gone by then; another source has no effect then, which is said."""
    source, run = uninterrupted.rename(tmp_path / "gone"), tmp_path / "tuned"
    file = small(tmp_path / "small.yaml", config, "none")
    words = ["train", str(file), "--workdir", str(run)]
    assert main([*words, "--init-from", str(source)]) == 0
    recorded = load_run_config(run / "config.yaml")
    assert recorded.model == TRAINED
    assert recorded.training.init_from == str(source)
    assert lines(run)[0]["loss"] < lines(source)[0]["loss"] - 0.1  # the source is trained
    shutil.rmtree(source)
    capsys.readouterr()
    assert main([*words, "--training.steps", "2"]) == 0
    assert f"training.init_from was '{source}', is now 'none'\n" in capsys.readouterr().err
    assert load_run_config(run / "config.yaml").model == TRAINED
    assert main(["train", str(file), "--workdir", str(tmp_path / "new")]) == 2
    missing = "no such file or directory, and not a Hugging Face id (owner/name)"
    assert capsys.readouterr().err == f"mythos: none: {missing}\n"


def test_given_fields_come_before_those_of_the_model(config, uninterrupted, tmp_path):
    file = small(tmp_path / "small.yaml", config, uninterrupted)
    assert load_config(file, ["--model.loops", "7"]).model.loops == 7
    file.write_text(f"{file.read_text()}\nmodel: {{loops: 6}}\n")
    assert load_config(file).model.loops == 6
    assert load_config(file).model.dim == TRAINED.dim
    assert load_config(file, ["--model.loops", "7"]).model.loops == 7
    assert load_config(file, ["--training.init_from", ""]).model == ModelConfig(loops=6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.dim", "24"], "{run}: its weights do not fit this config (model.dim is 32, not 24)"),
        (["--data.seq_len", "4096"], "data.seq_len: got 4096, allowed: at most model.max_seq_len, {longest}"),
        (
            ["--data.tokenizer", "{other}"],
            "data.tokenizer: got {other}, allowed: the tokenizer of {run}, bytes, because the run starts from its "
            "weights",
        ),
    ],
)
def test_what_does_not_fit_the_model(config, uninterrupted, tmp_path, capsys, words, message):
    other = tokenizer_kinds.save("byte_level", tmp_path)
    names = {"run": uninterrupted, "longest": TRAINED.max_seq_len, "other": other}
    file = small(tmp_path / "small.yaml", config, uninterrupted)
    words = [word.format(**names) for word in words]
    assert main(["train", str(file), "--workdir", str(tmp_path / "new"), *words]) == 2
    assert capsys.readouterr().err == f"mythos: {message.format(**names)}\n"
    assert not (tmp_path / "new").exists()


@pytest.fixture
def llama(tmp_path):
    """A published model with a chat template, settings, a licence, and a field that our config has no word for."""
    folder = tmp_path / "llama"
    tokenizer = tokenizer_kinds.save("byte_level", tmp_path)
    save_pretrained(folder, LLAMA, tiny.variables(LLAMA), "llama", tokenizer=tokenizer)
    settings = {"eos_token": tokenizer_kinds.END, "chat_template": talker.CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    (folder / "LICENSE").write_text("as is")
    fields = json.loads((folder / "config.json").read_text()) | {"transformers_version": "4.44.0"}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_a_run_talks_and_is_converted_as_the_model_that_it_started_from(config, llama, tmp_path, capsys):
    file, runs = tmp_path / "small.yaml", [tmp_path / "first", tmp_path / "second"]
    for run, source in zip(runs, [llama, runs[0]], strict=True):
        words = ["--data.path", str(tmp_path / "rows")]
        assert main(["train", str(small(file, config, source)), "--workdir", str(run), *words]) == 0
        # Beside it is the chat template; the run on text has none of its own.
        theirs = (llama if run == runs[0] else runs[0] / "source") / "tokenizer.json"
        assert f"data.tokenizer is {theirs}, that of training.init_from, {source}\n" in capsys.readouterr().err
        assert load_run_config(run / "config.yaml").data.tokenizer == str(theirs)
    shutil.rmtree(runs[0])
    again = ["train", str(file), "--workdir", str(runs[1]), "--data.path", str(tmp_path / "rows")]
    assert main([*again, "--training.steps", "2"]) == 0  # the run's own tokenizer
    assert "data.tokenizer" not in capsys.readouterr().err
    original, run = load_model(llama), load_model(runs[1])
    assert run.conventions.stop_tokens == original.conventions.stop_tokens
    assert 7 in run.conventions.stop_tokens
    question = [{"role": "user", "content": "which word?"}]
    assert Chat(run).tokens(question) == Chat(original).tokens(question)
    # Texts begin as the rows did that the run was trained on.
    assert run.conventions.first_tokens == (run.tokenizer.end_of_document,)
    assert main(["convert", str(runs[1]), str(tmp_path / "out"), "--to", "llama"]) == 0
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert json_or_text(tmp_path / "out" / name) == json_or_text(llama / name), name
    assert FileSource(tmp_path / "out").config == LLAMA


def test_the_tokenizer_is_that_of_the_model_unless_one_is_given(config, llama, tmp_path):
    file, own = small(tmp_path / "small.yaml", config, llama), str(llama / "tokenizer.json")
    assert load_config(file).data.tokenizer == own
    assert load_config(file, ["--data.tokenizer", "bytes"]).data.tokenizer == "bytes"
    task = ["--data.sources=[]", "--data.path=", "--data.task.name", "parity", "--data.task.difficulty", "[3]"]
    assert load_config(file, task).data.tokenizer == "bytes"  # which has no use for it
    assert load_config(file, [*task, "--data.task.tokens", "tokenizer"]).data.tokenizer == own
    shutil.move(own, tmp_path)
    assert load_config(file).data.tokenizer == "bytes"  # the model has none
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": str(llama)})
    )
    shutil.move(tmp_path / "tokenizer.json", own)
    words = ["--training.init_from", str(adapter)]
    assert load_config(file, words).data.tokenizer == own
    shutil.copy(own, adapter)
    assert load_config(file, words).data.tokenizer == str(adapter / "tokenizer.json")


def test_a_model_on_the_hub_is_not_downloaded_for_its_config(config, llama, tmp_path, monkeypatch):
    requested = []

    def download(repository, **keywords):
        requested.extend([repository, *keywords["allow_patterns"]])
        return str(llama)

    (llama / "model.safetensors").unlink()
    names = [SimpleNamespace(rfilename=name) for name in ("model.safetensors", "tokenizer.json")]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_: SimpleNamespace(siblings=names))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    read = load_config(small(tmp_path / "small.yaml", config, "some-one/some-model"))
    assert (read.model, read.data.tokenizer) == (LLAMA, "some-one/some-model")
    assert "some-one/some-model" in requested
    assert "*.safetensors" not in requested


def test_the_example_of_the_docs(llama, text_file, tmp_path, monkeypatch):
    """As it is, on other data, from another model and shorter; warmed up at once."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
    example = re.search("```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "lora.yaml").write_text(example[1])
    words = ["--init-from", str(llama), "--data.sources", f"[{text_file}]", "--data.seq_len", "16"]
    assert main(["train", "lora.yaml", *words, "--training.steps", "1", "--training.warmup_steps", "0"]) == 0
    assert load_model(tmp_path / "runs" / "lora").tokenizer.fingerprint == load_tokenizer(llama).fingerprint


def json_or_text(file):
    text = file.read_text()
    return json.loads(text) if file.suffix == ".json" else text


def test_tokens_that_are_no_text_get_no_tokenizer_from_the_source(llama, tmp_path):
    file = tmp_path / "task.yaml"
    data = {"task": {"name": "parity", "difficulty": [10]}, "seq_len": 16}
    file.write_text(yaml.safe_dump({"training": {"init_from": str(llama), **TRAINING}, "data": data}))
    assert main(["train", str(file), "--workdir", str(tmp_path / "run")]) == 0
    assert {path.name for path in (tmp_path / "run" / "source").iterdir()} == {"LICENSE", "source_config.json"}
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "llama"]) == 0
    assert json_or_text(tmp_path / "out" / "config.json") == json_or_text(llama / "config.json")


def test_a_run_passes_on_what_it_has_of_its_source_and_no_more(tmp_path):
    """Also to a run whose tokens are no text; and what an earlier start left there goes."""
    first, second = tmp_path / "first", tmp_path / "second"
    for file in ("source/LICENSE", "source/source_config.json", "source/tokenizer.json", "config.yaml"):
        (first / file).parent.mkdir(parents=True, exist_ok=True)
        (first / file).write_text(file)
    (second / "source").mkdir(parents=True)
    (second / "source" / "chat_template.jinja").write_text("of another model")
    for with_text, names in (
        (True, {"LICENSE", "source_config.json", "tokenizer.json"}),
        (False, {"LICENSE", "source_config.json"}),
    ):
        keep_source(str(first), second, with_text)
        assert {path.name for path in (second / "source").iterdir()} == names
    assert (second / "source" / "LICENSE").read_text() == "source/LICENSE"
