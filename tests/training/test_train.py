"""The training loop against uninterrupted runs: resume, kills, refusals, failures."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.cli import _exit_code
from mythos_jax.config import MeshConfig, load_config
from mythos_jax.errors import BadStepError, ConfigError, Interrupted, LockError, SaveError
from mythos_jax.processes import StopSignal
from mythos_jax.runs.checkpoints import Checkpoints, checksums
from mythos_jax.runs.load import load_model
from mythos_jax.runs.owner import LOCK_FILE, Owner
from mythos_jax.sharding import make_mesh
from mythos_jax.training import train as training
from mythos_jax.training.loggers import JsonlLogger
from mythos_jax.training.start import open_run_data
from mythos_jax.training.step import init_state
from mythos_jax.training.train import train
from mythos_jax.watch.reading import WatchedRun
from mythos_jax.watch.summary import summarise_all
from tests.survival import assert_same, lines, parameters, start, stop, timeless, wait_for_step, with_training
from tests.training.conftest import use_devices


def test_a_run_writes_its_files_and_learns(config, uninterrupted):
    rows = lines(uninterrupted)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert rows[0]["learning_rate"] > 0
    assert rows[0]["mean_loops"] == config.model.loops
    np.testing.assert_allclose(np.sum(rows[0]["expert_load"], axis=-1), 1, atol=1e-5)
    assert load_config(uninterrupted / "config.yaml") == config
    assert Checkpoints(uninterrupted / "checkpoints", read_only=True).steps() == [6, 8]
    bias = parameters(uninterrupted)["balance"]["recurrence"]["cell"]["layer_0"]["moe"]["router"]["bias"]
    assert np.abs(bias).max() > 0


def test_resume_equals_an_uninterrupted_run(config, uninterrupted, tmp_path, capsys):
    workdir = tmp_path / "resumed"
    train(config, workdir, progress=False)
    # As if the run had been killed during its last save: the newest checkpoint is of step 6, the log goes to step 8.
    shutil.rmtree(workdir / "checkpoints" / "8")
    log = workdir / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b"\n", b"\n\xff\n", 1) + b'{"step": 8, "los')
    train(config, workdir, progress=False)
    assert f"{log}: left out what is damaged, 1 lines (2)" in capsys.readouterr().err
    assert_same(parameters(uninterrupted), parameters(workdir))
    assert timeless(lines(workdir)) == timeless(lines(uninterrupted))
    (seen,) = summarise_all([WatchedRun(workdir)])
    assert (seen.state, seen.step, seen.restarts, seen.lost_steps) == ("finished", 8, 1, 2)
    assert seen.times is not None
    assert 0 < seen.times.goodput < 1
    assert seen.times.counted + seen.times.lost + seen.times.down <= seen.times.total
    assert 0 < seen.values["data_wait"] < seen.times.total
    assert seen.values["step_seconds_p50"] <= seen.values["step_seconds_max"]


def as_written_by_0_1_0(workdir):
    """Rewrites the config and the checkpoints' meta of a run to what mythos_jax 0.1.0 wrote."""
    old_names = {
        "grad_accumulation_steps": "accumulation",
        "decay_fraction": "decay_share",
        "final_learning_rate_fraction": "final_learning_rate",
        "loggers": "writers",
        "sample_per": "per",
        "held_out_fraction": "held_out",
    }
    config = (workdir / "config.yaml").read_text().split("\n", 1)[1]  # without the version
    for new, old in old_names.items():
        config = config.replace(f" {new}:", f" {old}:")
    (workdir / "config.yaml").write_text(config)
    for meta in workdir.glob("checkpoints/*/meta/metadata"):
        tree = json.loads(meta.read_text())
        tree.pop("digest", None)
        text = json.dumps(tree)
        for new, old in old_names.items():
            text = text.replace(f'"{new}":', f'"{old}":')
        assert '"accumulation":' in text
        meta.write_text(text)


def test_a_run_of_version_0_1_0_resumes_and_is_evaluated(config, uninterrupted, tmp_path, capsys):
    workdir = shutil.copytree(uninterrupted, tmp_path / "old")
    shutil.rmtree(workdir / "checkpoints" / "8")
    as_written_by_0_1_0(workdir)
    capsys.readouterr()
    assert load_model(workdir).config == config
    train(config, workdir, progress=False)
    assert "resuming" in capsys.readouterr().err
    assert_same(parameters(uninterrupted), parameters(workdir))
    changed = dataclasses.replace(config, training=dataclasses.replace(config.training, grad_accumulation_steps=2))
    as_written_by_0_1_0(workdir)
    train(with_training(changed, steps=9), workdir, progress=False)
    assert "training.grad_accumulation_steps was 1, is now 2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sixty_steps(tmp_path_factory):
    return tmp_path_factory.mktemp("sixty") / "uninterrupted"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_resumes_as_if_nothing_had_happened(config, tmp_path, number, sixty_steps):
    config = with_training(config, steps=60, checkpoint_every=20, optimizer_dtype="bfloat16")
    if not sixty_steps.exists():
        train(config, sixty_steps, progress=False)
    workdir = tmp_path / "stopped"
    process = start(config, workdir)
    wait_for_step(workdir, 25, process)
    with pytest.raises(LockError, match=rf"stopped: in use by process {process.pid} on "):
        train(with_training(config, learning_rate=0.5), workdir, progress=False)  # the first goes on, undisturbed
    errors = stop(process, number)
    saved = Checkpoints(workdir / "checkpoints", read_only=True).newest()
    if number == signal.SIGKILL:
        assert saved in (None, 20, 40)
    else:
        assert 25 <= saved < 60
        assert f"stopped by {signal.Signals(number).name} after step {saved}; checkpoint saved" in errors
    train(config, workdir, progress=False)
    assert_same(parameters(sixty_steps), parameters(workdir))
    assert timeless(lines(workdir)) == timeless(lines(sixty_steps))


def test_a_full_disk_is_a_one_line_error_and_keeps_earlier_checkpoints(config, tmp_path):
    """A limit on file sizes simulates the full disk: the write fails in the same place."""
    workdir = tmp_path / "full"
    train(with_training(config, steps=3), workdir, progress=False)

    config = with_training(config, steps=6, checkpoint_every=6)
    limited = ["bash", "-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "-"]
    _, errors = (process := start(config, workdir, limited)).communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "checkpoint could not be written" in errors
    assert "Traceback" not in errors, errors
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps() == [3]


def test_an_incomplete_checkpoint_is_not_restored(config, uninterrupted, tmp_path):
    half = uninterrupted / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(uninterrupted / "checkpoints" / "8", half)
    assert Checkpoints(uninterrupted / "checkpoints", read_only=True).newest() == 8
    assert load_model(uninterrupted).step == 8


def data_files(folder):
    """The files of a checkpoint that contain its weights."""
    return [file for file in (folder / "model").rglob("*") if file.is_file() and file.parent.name == "d"]


def flip_bits(folder):
    """One bit in the middle of each file."""
    for file in data_files(folder):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        file.write_bytes(data)


def truncate(folder):
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[:100])


def swap_the_contents(folder):
    """Another checkpoint's arrays in place of these: intact files with the wrong contents."""
    shutil.rmtree(folder / "model")
    shutil.copytree(folder.parent / "6" / "model", folder / "model")


def truncate_metadata(folder):
    file = folder / "meta" / "metadata"
    file.write_bytes(file.read_bytes()[:100])


def change_a_digit_of_the_metadata(folder):
    """Still JSON, but now of a run with another model."""
    file = folder / "meta" / "metadata"
    text = file.read_text()
    changed = text.replace("264", "265", 1)
    assert json.loads(changed)["model"]["vocab_size"] == 265
    file.write_text(changed)


# Orbax and TensorStore leave failed reads to an event loop that has been closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [flip_bits, truncate, swap_the_contents, truncate_metadata, change_a_digit_of_the_metadata],
)
def test_a_damaged_checkpoint_is_set_aside_for_the_previous_one(config, uninterrupted, capsys, damage):
    expected, log = parameters(uninterrupted), timeless(lines(uninterrupted))
    damage(uninterrupted / "checkpoints" / "8")
    train(config, uninterrupted, progress=False)
    errors = capsys.readouterr().err
    assert "checkpoints/8: damaged, trying the previous one" in errors
    assert "after step 6" in errors
    assert (uninterrupted / "checkpoints" / "8.damaged").is_dir()
    assert_same(expected, parameters(uninterrupted))
    assert timeless(lines(uninterrupted)) == log


def test_checksums_detect_every_flipped_bit_on_any_sharding():
    rng = np.random.default_rng(0)
    tree = {"a": rng.standard_normal((6, 8)).astype(np.float32), "b": np.arange(5, dtype=np.int32)}
    truth = np.asarray(checksums(tree))
    mesh = make_mesh(MeshConfig(fsdp=2, data=4), jax.local_devices())
    for spec in [PartitionSpec("fsdp"), PartitionSpec(None, "data"), PartitionSpec("fsdp", "data")]:
        placed = {**tree, "a": jax.device_put(tree["a"], NamedSharding(mesh, spec))}
        np.testing.assert_array_equal(checksums(placed), truth)
    for bit in rng.integers(0, 48 * 32, 40):
        words = tree["a"].copy().view(np.uint32).ravel()
        words[bit // 32] ^= np.uint32(1 << (bit % 32))
        changed = {**tree, "a": words.view(np.float32).reshape(6, 8)}
        assert np.asarray(checksums(changed))[0] != truth[0]
    swapped = {**tree, "a": tree["a"][::-1].copy()}
    assert np.asarray(checksums(swapped))[0] != truth[0]


@pytest.mark.slow
def test_a_run_moves_between_one_two_and_eight_devices(config, tmp_path, monkeypatch):
    """Same global batches; the loss equals that of a run on one device to 1e-5 over the first six steps, which include
    a restore on two devices, and to 1e-4 throughout."""
    config = with_training(config, steps=9, checkpoint_every=3, schedule="constant")
    train(config, tmp_path / "unmoved", progress=False)
    for devices, steps in [(1, 3), (2, 6), (8, 9)]:
        use_devices(monkeypatch, devices)
        train(with_training(config, steps=steps), tmp_path / "moved", progress=False)
    unmoved, moved = ([row["loss"] for row in lines(tmp_path / name)] for name in ("unmoved", "moved"))
    np.testing.assert_allclose(moved[:6], unmoved[:6], atol=1e-5)
    np.testing.assert_allclose(moved, unmoved, atol=1e-4)


def test_resume_refuses_another_model_batch_seed_or_data(config, uninterrupted, tmp_path, text_file):
    before = parameters(uninterrupted)
    model = dataclasses.replace(config.model, act_threshold=0.5, rope_theta=5e4)
    with pytest.raises(ConfigError, match=r"model\.rope_theta was 10000\.0, is 50000\.0; model\.act_threshold was"):
        train(dataclasses.replace(config, model=model), uninterrupted, progress=False)
    with pytest.raises(ConfigError, match=r"training\.batch_size was 8, is 16"):
        train(with_training(config, batch_size=16), uninterrupted, progress=False)
    with pytest.raises(ConfigError, match=r"training\.seed was 0, is 1"):
        train(with_training(config, seed=1), uninterrupted, progress=False)
    data = dataclasses.replace(config.data, path=str(tmp_path / "other"), held_out_fraction=0.5)
    with pytest.raises(ConfigError, match="data was"):
        train(dataclasses.replace(with_training(config, steps=10), data=data), uninterrupted, progress=False)
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == ["6", "8"]  # nothing was set aside
    assert_same(before, parameters(uninterrupted))


def test_text_that_has_changed_is_refused_before_a_run_begins(config, tmp_path, text_file, capsys):
    text, run_dir = shutil.copytree(text_file, tmp_path / "text"), tmp_path / "run"
    data = dataclasses.replace(config.data, path=str(tmp_path / "rows"), sources=(str(text),))
    config = dataclasses.replace(config, data=data)
    identity = open_run_data(config, run_dir, progress=False).identity
    (text / "new.txt").write_text("more")
    with pytest.raises(ConfigError, match=r"data\.sources: the text has changed since .*rows was prepared"):
        open_run_data(config, run_dir, progress=False)
    (run_dir / "checkpoints" / "3" / "meta").mkdir(parents=True)
    assert open_run_data(config, run_dir, progress=False).identity == identity
    assert "the run goes on with the rows that it was started with" in capsys.readouterr().err


def test_training_for_more_steps_is_announced(config, uninterrupted, capsys):
    train(with_training(config, steps=10), uninterrupted, progress=False)
    errors = capsys.readouterr().err
    assert "training.steps was 8, is now 10: the learning rate's cosine now ends at step 10" in errors
    assert load_model(uninterrupted).step == 10


def test_a_nan_or_infinite_loss_stops_the_run(config, tmp_path):
    config = with_training(config, learning_rate=1e30, checkpoint_every=1, gradient_clip=0.0)
    with pytest.raises(
        BadStepError, match=r"step [2-8]: \w+ is (nan|inf); training stopped, the newest checkpoint is of"
    ):
        train(config, tmp_path / "nan", progress=False)
    assert load_model(tmp_path / "nan").step >= 1


@pytest.fixture
def skipping(config):
    """The first update leaves weights that are finite and wrong; every later one is skipped."""
    return with_training(config, bad_steps="skip", learning_rate=1e20, gradient_clip=0.0, warmup_steps=0)


def test_skipping_gives_up_and_saves_nothing_more(skipping, tmp_path):
    config = with_training(skipping, max_bad_steps=4, checkpoint_every=1)
    saved = "4 updates in a row were skipped, the newest checkpoint is of step 1"
    with pytest.raises(BadStepError, match=rf"step 5: (loss|gradient_norm) is (nan|inf); {saved}"):
        train(config, tmp_path / "run", progress=False)
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [1]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(row, parse_constant=pytest.fail) for row in rows]  # bare NaN and Infinity are not JSON
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["loss"] is None or row["gradient_norm"] is None for row in rows] == [False] + [True] * 4


def test_a_skipped_step_delays_a_checkpoint_until_the_next_good_one(skipping, tmp_path, monkeypatch):
    bad, read = {3, 4, 7, 8}, training._Loop._read

    def read_as_told(self, log, steps):
        read(self, log, [(step, {**metrics, "bad": step in bad}) for step, metrics in steps])

    monkeypatch.setattr(training._Loop, "_read", read_as_told)
    train(with_training(skipping, keep_checkpoints=9), tmp_path / "run", progress=False)
    # They were due after steps 3 and 6; the last step is always saved.
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [5, 6, 8]


def test_weights_that_became_nan_are_not_saved(config, tmp_path, monkeypatch):
    """The loss of a step can be finite where the weights after its update are not."""
    state = init_state(config, make_mesh(config.mesh))
    broken = state.replace(variables=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), state.variables))
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        assert not checkpoints.save(broken, {})
        assert checkpoints.steps() == []
    monkeypatch.setattr(Checkpoints, "save", lambda *_: False)
    with pytest.raises(BadStepError, match=r"step 3: the updated weights are NaN or infinite; .*no checkpoint was"):
        train(config, tmp_path / "run", progress=False)


def at_step(monkeypatch, number, action):
    """Runs `action` when a step is logged."""
    write = JsonlLogger.write

    def acting(self, step, metrics):
        write(self, step, metrics)
        if step == number:
            action()

    monkeypatch.setattr(JsonlLogger, "write", acting)


def test_a_run_that_another_process_has_taken_over_saves_nothing(config, tmp_path, monkeypatch):
    thief = json.dumps(dataclasses.asdict(dataclasses.replace(Owner.this_process(), host="other", token="thief")))
    at_step(monkeypatch, 2, lambda: (tmp_path / "run" / LOCK_FILE).write_text(thief))
    with pytest.raises(LockError, match=r"process \d+ on other, .* has taken this run over"):
        train(config, tmp_path / "run", progress=False)
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == []
    assert (tmp_path / "run" / LOCK_FILE).read_text() == thief


# Orbax leaves a failed save to an event loop that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nothing_waits_for_a_save_that_failed(config, tmp_path, monkeypatch):
    """Python would wait at exit for every thread that is no daemon; Orbax's wait for five minutes."""
    checkpoints, before = tmp_path / "run" / "checkpoints", set(threading.enumerate())
    at_step(monkeypatch, 2, lambda: (checkpoints.rmdir(), checkpoints.write_text("")))
    with pytest.raises(SaveError, match="checkpoints: checkpoint could not be written"):
        train(config, tmp_path / "run", progress=False)
    ends = time.monotonic() + 60
    while waiting := [t for t in set(threading.enumerate()) - before if not t.daemon]:
        assert time.monotonic() < ends, waiting
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_and_a_closed_terminal_are_reasons_to_save(config, tmp_path, monkeypatch, number):
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    stopped_by = rf"stopped by {number.name} after step [2-5]; checkpoint saved"
    with pytest.raises(Interrupted, match=stopped_by) as stopped:
        train(config, tmp_path / "run", progress=False)
    assert _exit_code(stopped.value) == 42
    assert str(Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).newest()) in str(stopped.value)


def test_a_closed_terminal_is_ignored_under_nohup():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal().watching() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reached() is None
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "x").write_text("x"))])
def test_a_workdir_that_is_not_a_run_is_left_alone(config, tmp_path, make):
    make(tmp_path / "taken")
    with pytest.raises(ConfigError, match=r"taken: (is a file|contains files but no run)"):
        train(config, tmp_path / "taken", progress=False)


def test_batch_size_must_be_divisible_by_the_devices(config, tmp_path, monkeypatch):
    use_devices(monkeypatch, 8)
    with pytest.raises(ConfigError, match=r"training\.batch_size: got 12, allowed: a multiple of 8"):
        train(with_training(config, batch_size=12), tmp_path / "run", progress=False)
