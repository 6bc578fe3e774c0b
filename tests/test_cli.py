"""The command line as a user sees it: results, one-line errors, exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from mythos_jax.cli import main
from mythos_jax.inference.generate import GenerateResult
from mythos_jax.porting.pretrained import load_pretrained
from mythos_jax.runs.load import load_model
from mythos_jax.version import __version__
from tests.tiny import DENSE_FIELDS

GOLDEN = Path(__file__).parent / "golden"
CONFIG = {
    "name": "tiny",
    "model": DENSE_FIELDS,
    "training": {"steps": 2, "batch_size": 8, "log_every": 1},
    "data": {"seq_len": 16, "held_out_fraction": 0.2},
    "evaluation": {"batch_size": 8, "max_rows": 16},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, a config, and a run trained from them."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text").mkdir()
    for i in range(20):
        (place / "text" / f"{i}.txt").write_text(f"document {i} has words and more words " * 4)
    data = {**CONFIG["data"], "path": str(place / "data"), "sources": [str(place / "text")]}
    (place / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data}))
    assert main(["train", str(place / "tiny.yaml"), "--workdir", str(place / "run")]) == 0
    return place


def fails(capsys, words, code=2):
    """Runs a command that must fail; returns the one line that it prints."""
    try:
        got = main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        got = stop.code
    assert got == code
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


def test_eval_prints_a_table_and_writes_a_report(place, capsys):
    assert main(["eval", str(place / "run"), "--loops", "1,3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:3]] == ["loops", "1", "3"]
    assert (place / "run" / "report" / "index.html").exists()


def test_eval_json_prints_nothing_else_on_standard_output(place, capsys):
    assert main(["eval", str(place / "run"), "--loops", "2", "--halting", "latent:0.5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["halting"], r["threshold"]) for r in result["results"]] == [(None, None), ("latent", 0.5)]
    assert 1 <= result["results"][1]["mean_loops"] <= result["results"][0]["mean_loops"] == 2


def test_generate_and_info(place, capsys):
    assert main(["generate", str(place / "run"), "doc", "--max-new-tokens", "4", "--temperature", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("doc")
    # A key and a value of 16 float32 in two layers and two loops of a third.
    assert re.search(r"^mythos: [1-4] tokens, 2.00 loops per token, (.* tokens/s, )?512 bytes of cache per token$", err)
    assert main(["info", str(place / "run")]) == 0
    assert "parameters: " in capsys.readouterr().out


def test_ctrl_c_ends_the_text_with_a_newline(place, capsys, monkeypatch):
    def stream(*_, **__):
        yield GenerateResult(np.array([[ord("a"), ord("b")]]), np.array([2]), np.array([[2, 2]]))
        raise KeyboardInterrupt

    monkeypatch.setattr("mythos_jax.inference.text.stream", stream)
    assert main(["generate", str(place / "run"), "doc"]) == 130
    assert capsys.readouterr() == ("docab\n", "mythos: interrupted\n")


def test_a_run_converts_and_can_be_fine_tuned(place, capsys, tmp_path):
    words = ["convert", str(place / "run"), str(tmp_path / "out"), "--to", "mythos_jax", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    _, variables = load_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, variables["params"], load_model(place / "run").variables["params"])
    config = place / "tiny.yaml"
    assert main(["train", str(config), "--workdir", str(tmp_path / "tuned"), "--init-from", str(tmp_path / "out")]) == 0
    first = json.loads((tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()[0])
    scratch = json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < scratch["loss"]
    assert "exists" in fails(capsys, words)


def test_a_pretrained_model_is_evaluated_generated_from_and_described(place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    golden = str(GOLDEN / "huginn")
    assert main(["info", golden]) == 0
    stored = sum(array.size for array in load_file(GOLDEN / "huginn" / "model.safetensors").values())
    assert f"parameters: {stored:,}" in capsys.readouterr().out
    assert "--data DIR" in fails(capsys, ["eval", golden])
    assert "vocab_size is 258, allowed: at most the model's, 120" in fails(
        capsys, ["eval", golden, "--data", place / "data"]
    )
    assert "(--tokenizer FILE or bytes)" in fails(capsys, ["generate", golden, "x"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "missing.yaml"], "mythos: missing.yaml: cannot be read (No such file or directory)"),
        (["train", "{config}", "--model.dmi", "3"], "mythos: model.dmi: unknown key; did you mean model.dim?"),
        (["train", "{config}", "--model.loops", "0"], "mythos: model.loops: got 0, allowed: an integer >= 1"),
        (["train", "{config}", "--workdir", "{text}"], "contains files but no run"),
        (["eval", "{text}"], "weight files"),
        (["eval", "nothing-here"], "nothing-here: no such file or directory"),
        (["eval", "{run}", "--step", "7"], "no checkpoint of step 7; allowed: 2"),
        (["eval", "{run}", "--loops", "1,x"], "got '1,x', allowed: integers >= 1, separated by commas"),
        (["eval", "{run}", "--halting", "latent:0.1,latent:x"], "got 'latent:x', allowed: CRITERION:THRESHOLD"),
        (["eval", "{run}", "--loops", "4-1"], "got '4-1', allowed: integers >= 1"),
        (
            ["eval", "{run}", "--halting", "entropie"],
            "got 'entropie', allowed: act, latent, cosine, kl, ",
        ),
        (["eval", "{run}", "--halting", "act"], "allowed with readout last: latent, cosine, kl, entropy, argmax"),
        (["generate", "{run}", "x", "--max-new-tokens", "4", "--halting", "act"], "allowed with readout last: latent"),
        (
            ["generate", "{run}", "x", "--max-new-tokens", "4", "--halting", "kl:-1"],
            "threshold: got -1.0, allowed: ",
        ),
        (
            ["generate", "{run}", "x", "--max-new-tokens", "4", "--loop-cache", "modulo:0"],
            "argument --loop-cache: got 'modulo:0', allowed: all, last, first, or modulo:N with N >= 1",
        ),
        (
            ["generate", "{run}", "x", "--max-new-tokens", "4", "--prefill-chunk", "0"],
            "argument --prefill-chunk: got 0, allowed: ",
        ),
        (["eval", "{run}", "--data", "{text}"], "has no manifest.json"),
        (["eval", "{run}", "--nonsense"], "unknown argument '--nonsense' for `mythos eval`"),
        (["generate", "{run}", "x" * 40], "max_seq_len"),
        (["generate", "{run}", "x", "--max-new-tokens", "4", "--top-k", "1000"], "top_k"),
        (["generate", "{run}", "x", "--max-new-tokens", "4", "--temperature", "-1"], "temperature"),
        (["evl", "{run}"], "mythos: unknown command 'evl'; did you mean eval?"),
        (["sing"], "mythos: unknown command 'sing'; allowed: train, eval, generate, "),
        (["predictor", "{run}"], "mythos: `mythos predictor` is now `mythos train-predictor`"),
        (["data", "prepare", "nowhere", "--out", "{text}/../new"], "nowhere"),
        (
            ["convert", "{run}", "{text}/../o", "--to", "gguf"],
            "format: got 'gguf', allowed: mythos_jax_int8, mythos_jax",
        ),
        (["convert", "{run}", "{text}/../o", "--to", "openmythos"], "openmythos cannot express"),
        (["train", "{config}", "--workdir", "{text}/../new", "--init-from", "{text}"], "weight files"),
    ],
)
def test_wrong_input_is_a_one_line_error_with_exit_code_2(place, capsys, words, line):
    names = {"config": place / "tiny.yaml", "run": place / "run", "text": place / "text"}
    assert line in fails(capsys, [word.format(**names) for word in words])


def test_version_and_help_start_without_jax():
    code = """
import sys
sys.modules["jax"] = sys.modules["numpy"] = None  # importing it raises
from mythos_jax.cli import COMMANDS, main
for words in [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]:
    try:
        main(words)
    except SystemExit as stop:
        assert stop.code == 0
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == f"mythos {__version__}"
    module = subprocess.run([sys.executable, "-m", "mythos_jax", "--version"], capture_output=True, text=True)
    assert module.stdout == f"mythos {__version__}\n"


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(ValueError, match="cannot be read"):
        main(["train", "missing.yaml", "--debug"])


def test_sigterm_before_the_first_step_exits_with_the_restart_code(place, tmp_path, capsys, monkeypatch):
    def train(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("mythos_jax.training.train.train", train)
    before = signal.getsignal(signal.SIGTERM)
    line = fails(capsys, ["train", place / "tiny.yaml", "--workdir", tmp_path / "run"], code=42)
    assert "stopped by SIGTERM outside the training loop" in line
    assert signal.getsignal(signal.SIGTERM) == before
