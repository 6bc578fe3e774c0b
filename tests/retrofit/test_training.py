"""From a dense run to a looped one: each step is a command that a user types."""

import json

import numpy as np
import yaml

from mythos_jax.cli import main
from mythos_jax.porting.reading import FileSource
from mythos_jax.runs.load import load_model
from tests.porting import golden

TASK = [
    "--data.task.name=parity",
    "--data.task.difficulty=[6]",
    "--data.seq_len=8",
    "--data.path=",
    "--training.batch_size=8",
    "--training.optimizer=adamw",  # the step compiles in half the time
]


def test_a_retrofitted_model_trains_by_its_own_config(tmp_path, capsys):
    out, run = tmp_path / "looped", tmp_path / "run"
    assert main(["retrofit", str(golden.FOLDER / "llama"), str(out), "--loops", "2", "--no-compare"]) == 0
    train = ["train", str(out / "train.yaml"), "--workdir", str(run), *TASK, "--training.warmup_steps=0"]
    assert main([*train, "--training.steps=2", "--training.checkpoint_every=1"]) == 0
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["training"]["init_from"] == str(out)
    assert stored["model"]["injection"] == "concat"
    trained = load_model(run)
    start = FileSource(out)
    assert trained.config.model == start.config  # no field of the model is in train.yaml
    adapter = trained.variables["params"]["recurrence"]["cell"]["injection"]["adapter"]["kernel"]
    before = start.parameter("params.recurrence.cell.injection.adapter.kernel")
    assert np.abs(adapter[:64]).max() > 0 == np.abs(before[:64]).max()  # the state has begun to count
    capsys.readouterr()
    assert main(["convert", str(run), str(tmp_path / "raven"), "--to", "raven", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
