"""What `train` refuses before its first step, what it leaves behind when it does, and runs that have nothing to do."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from mythos_jax.cli import main
from mythos_jax.config import Config, TrainingConfig, load_config, save_config
from mythos_jax.errors import ConfigError, LockError
from mythos_jax.runs.lock import locked
from mythos_jax.runs.owner import LOCK_FILE, Owner
from mythos_jax.sharding import AXES
from mythos_jax.training import train as training
from mythos_jax.training.start import check_on_mesh
from mythos_jax.training.train import train
from tests.survival import lines, with_training


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def never(*_, **__):
    raise AssertionError("a step was compiled")


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(training, "make_train_step", never)


@pytest.mark.parametrize(("steps", "says"), [(8, ""), (5, ", which is past training.steps, 5")])
def test_a_finished_run_says_so_and_changes_nothing(config, uninterrupted, tmp_path, capsys, no_step, steps, says):
    run = uninterrupted
    before = contents(run)
    save_config(with_training(config, steps=steps), tmp_path / "again.yaml")
    assert main(["train", str(tmp_path / "again.yaml"), "--workdir", str(run)]) == 0
    out, errors = capsys.readouterr()
    assert errors == f"{run}: is trained to step 8 already{says}; nothing is left to do\n"
    assert out.startswith(f"trained to step 8, loss {lines(run)[-1]['loss']:.4f} nats per token\n")
    assert contents(run) == before
    assert train(with_training(config, steps=steps), run, progress=False) == lines(run)[-1]


@pytest.mark.parametrize("log", [None, b"", b'\xff{"step": 8\n', b'{"step": 8, "held_out_loss": 1.0}\n'])
def test_a_finished_run_that_lost_its_log_is_finished(config, uninterrupted, tmp_path, capsys, log):
    run = uninterrupted
    (run / "metrics.jsonl").unlink()
    if log is not None:
        (run / "metrics.jsonl").write_bytes(log)
    save_config(config, tmp_path / "again.yaml")
    assert main(["train", str(tmp_path / "again.yaml"), "--workdir", str(run)]) == 0
    assert capsys.readouterr().out.startswith("trained to step 8\n")


def test_nothing_is_prepared_for_a_finished_run(config, uninterrupted, tmp_path, capsys):
    gone = tmp_path / "gone"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(gone)))
    assert train(config, uninterrupted, progress=False) == lines(uninterrupted)[-1]
    assert not gone.exists()
    more = dataclasses.replace(with_training(config, steps=9), data=dataclasses.replace(config.data, sources=()))
    with pytest.raises(ConfigError, match="nothing prepared"):
        train(more, uninterrupted, progress=False)


@pytest.mark.parametrize("prepared", [False, True])
def test_evaluations_without_held_out_rows_are_refused(config, tmp_path, no_step, prepared):
    """By the config alone, or, where the config names no sources, by the data that it finds."""
    data = dataclasses.replace(config.data, path=str(tmp_path / "rows"), held_out_fraction=0.0)
    if prepared:
        from mythos_jax.data.open import open_data

        open_data(dataclasses.replace(config, data=data), progress=False)
        data = dataclasses.replace(data, sources=())
    config = with_training(dataclasses.replace(config, data=data), evaluate_every=4)
    says = r"because of the data \(.*no rows are held out" if prepared else "with data.held_out_fraction 0"
    with pytest.raises(ConfigError, match=rf"training\.evaluate_every: got 4, allowed: 0,? {says}"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert prepared or not (tmp_path / "rows").exists()


def test_a_profile_of_steps_that_never_run_is_refused(config, tmp_path, no_step):
    with pytest.raises(
        ConfigError, match=r"training\.profile_steps: got \[9, 12\], allowed: steps up to training\.steps, 8"
    ):
        train(with_training(config, profile_steps=(9, 12)), tmp_path / "run", progress=False)


def test_a_wrong_init_from_does_not_block_its_own_retry(config, uninterrupted, tmp_path, monkeypatch):
    run = uninterrupted
    with pytest.raises(ConfigError, match="typo"):
        train(config, tmp_path / "tuned", progress=False, init_from=tmp_path / "typo")
    assert not (tmp_path / "tuned").exists()
    monkeypatch.setattr(training._Loop, "run", lambda self, state: {"step": int(state.step)})
    assert train(config, tmp_path / "tuned", progress=False, init_from=run) == {"step": 0}


def test_the_average_of_a_run_starts_from_the_same_weights(config, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(training._Loop, "run", lambda self, state: jax.device_get(state))
    state = train(with_training(config, ema_decay=0.9), tmp_path / "tuned", progress=False, init_from=uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, state.average, state.variables["params"])


def test_a_run_that_was_killed_before_its_first_file_can_be_started(config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    dead = dataclasses.asdict(dataclasses.replace(Owner.this_process(), started="1"))
    (run / LOCK_FILE).write_text(json.dumps(dead))
    (run / ".lock.json.1.tmp").write_text("")
    monkeypatch.setattr(training._Loop, "run", lambda self, state: {"step": int(state.step)})
    assert train(config, run, progress=False) == {"step": 0}


def test_a_place_that_cannot_be_written_is_refused(config, tmp_path, no_step):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: cannot be written \(Not a directory\)"):
        train(config, tmp_path / "file" / "run", progress=False)
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match=r"run/checkpoints: cannot be written \(File exists\)"):
        train(config, tmp_path / "run", progress=False)


def test_a_second_start_touches_nothing(config, uninterrupted):
    """Not even what a start that has the lock would change: temporary checkpoints, the config, the log."""
    run = uninterrupted
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "9.orbax-checkpoint-tmp" / "half").write_text("")
    with locked(run):
        before = contents(run)
        with pytest.raises(LockError, match=r"uninterrupted: in use by process \d+ on "):
            train(with_training(config, steps=9, learning_rate=0.5), run, progress=False)
        assert contents(run) == before


def mesh_of(**sizes):
    """Only its shape: no such devices are attached."""
    return types.SimpleNamespace(shape={axis: sizes.get(axis, 1) for axis in AXES})


def test_a_mesh_that_divides_few_weights_is_refused():
    """Huginn's width, 5280, is 32 x 165: 256 devices along fsdp would each hold all of the model."""
    config = load_config("configs/huginn_0125.yaml")
    with pytest.raises(ConfigError, match=r"100.0% of the parameters would be replicated .* fsdp 256 does not divide"):
        check_on_mesh(config, mesh_of(fsdp=256))
    check_on_mesh(config, mesh_of(data=8, fsdp=32))


def test_parts_of_a_batch_that_leave_devices_without_rows_are_announced(caplog):
    for parts, warnings in ((2, 0), (4, 1)):
        training = TrainingConfig(batch_size=16, grad_accumulation_steps=parts)
        check_on_mesh(Config(training=training), mesh_of(data=8))
        assert sum("parts have 4 rows" in record.message for record in caplog.records) == warnings
