"""A run trained on some number of devices is evaluated and used on any other, with the same numbers."""

import json
import shutil

import jax
import numpy as np
import pytest

from mythos_jax import cli
from mythos_jax.config import Config, DataConfig, EvaluationConfig, TaskConfig, TrainingConfig
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.policies import fixed
from mythos_jax.evaluation.scoring import score
from mythos_jax.language_model import load
from mythos_jax.runs.load import load_model
from mythos_jax.training import train
from mythos_jax.training.predictor import record_exits
from tests.training.conftest import MODEL, use_devices


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """A copy of a run that was trained on two devices."""
    monkeypatch.chdir(home)
    return shutil.copytree(home / "run", tmp_path / "run")


@pytest.mark.parametrize("count", [1, 3, 8])
def test_another_number_of_devices_is_said_and_generates_the_same(run, monkeypatch, capsys, count):
    use_devices(monkeypatch, count)
    lm = load(run)
    where = "one device" if count == 1 else f"fsdp {count}"
    assert capsys.readouterr().err == f"mesh: that of {run} does not fit the devices here; using {where}\n"
    use_devices(monkeypatch, 2)
    same = load(run)
    assert capsys.readouterr().err == ""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(lm.variables), jax.device_get(same.variables))
    if count == 3:
        assert lm.generate("document", max_new_tokens=4) == same.generate("document", max_new_tokens=4)


def test_the_numbers_do_not_depend_on_the_devices(run, monkeypatch):
    found = []
    for count in (2, 3):
        use_devices(monkeypatch, count)
        lm = load(run)
        (result,) = lm.evaluate().results
        exits = record_exits(lm.loaded, 2, 6, progress=False)
        (scored,) = score(lm.loaded, [([*b"some text"], 4)], fixed([2])[0], progress=False)
        found.append([result.loss, scored.log_likelihood, len(exits[0]), *(float(x.sum()) for x in exits)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_the_mesh_can_be_chosen_and_nothing_else_can(run, monkeypatch, capsys):
    use_devices(monkeypatch, 8)
    words = ["--mesh.tensor", "2", "--mesh.data", "1", "--mesh.fsdp=-1", "--evaluation.max_rows", "3"]
    lm = load(run, overrides=words)
    assert (lm.mesh.shape["tensor"], lm.mesh.shape["fsdp"], lm.config.evaluation.max_rows) == (2, 4, 3)
    with pytest.raises(ConfigError, match="mesh: got data 2 x fsdp 1 x tensor 3"):  # not replaced by the default
        load_model(run, overrides=["--mesh.tensor", "3"])
    for command, words, message in [
        ("eval", ["--model.dim", "3"], "--model.dim: fixed by the run; allowed: --mesh.FIELD and --evaluation.FIELD"),
        ("eval", ["--data.path", "x"], "--data.path: fixed by the run; allowed: --mesh.FIELD and --evaluation.FIELD"),
        ("train-predictor", ["--evaluation.max_rows", "3"], "--evaluation.max_rows: fixed by the run; allowed: "),
        ("eval", ["--lops", "3"], "unknown argument '--lops' for `mythos eval`; did you mean --loops?"),
        ("eval", ["--mesh.tensr", "3"], "mesh.tensr: unknown key; did you mean mesh.tensor?"),
    ]:
        assert cli.main([command, str(run), *words]) == 2
        assert capsys.readouterr().err.startswith(f"mythos: {message}")
    assert cli.main(["generate", str(run), "a", "--mesh.tensor", "3", "--max-new-tokens", "1"]) == 2
    assert "mythos: mesh: got data 2 x fsdp 1 x tensor 3" in capsys.readouterr().err


def test_eval_on_the_command_line_takes_a_mesh_and_rows(run, monkeypatch, capsys):
    use_devices(monkeypatch, 8)
    words = ["--mesh.fsdp", "8", "--mesh.data", "1", "--evaluation.max_rows", "3", "--evaluation.batch_size", "8"]
    assert cli.main(["eval", str(run), "--json", *words]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert len(json.loads(output.out)["results"]) == 1


def test_problems_of_a_task_fill_a_batch_for_any_number_of_devices(tmp_path, monkeypatch):
    config = Config(
        name="task",
        model=MODEL,
        training=TrainingConfig(steps=1, batch_size=4, warmup_steps=0),
        data=DataConfig(task=TaskConfig("parity", (8,)), seq_len=16),
        evaluation=EvaluationConfig(batch_size=5, max_rows=12, loops=(2,)),
    )
    train.train(config, tmp_path / "run", progress=False)
    values = []
    for count in (1, 3):
        use_devices(monkeypatch, count)
        evaluation = load(tmp_path / "run").evaluate()
        values.append([(result.metric, result.value, result.n) for result in evaluation.results])
    assert values[0] == values[1]
