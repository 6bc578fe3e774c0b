"""Two processes of four devices each, as one run: started, stopped, restarted, and its checkpoints read elsewhere."""

import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from launch.local_processes import combined_exit_code, main
from mythos_jax import processes
from mythos_jax.cluster import Cluster, find_cluster
from mythos_jax.config import (
    Config,
    DataConfig,
    DistillationConfig,
    LoraConfig,
    MeshConfig,
    TaskConfig,
    TrainingConfig,
    save_config,
)
from mythos_jax.errors import ConfigError, StorageError, TrainingError
from mythos_jax.porting.pretrained import save_pretrained
from mythos_jax.processes import of_process_zero, process_zero_first, raise_together
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.sharding import make_mesh
from mythos_jax.training.step import init_state
from mythos_jax.training.train import train
from tests import tiny
from tests.survival import with_training
from tests.training.conftest import MODEL, use_devices

LAUNCHER = Path(__file__).parents[1] / "launch" / "local_processes.py"
CONFIG = Config(
    name="two",
    model=dataclasses.replace(MODEL, vocab_size=16),
    training=TrainingConfig(steps=8, batch_size=8, checkpoint_every=100, log_every=1, warmup_steps=2),
    data=DataConfig(task=TaskConfig("parity", (16,)), seq_len=32),
)


def losses(workdir):
    log = Path(workdir) / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {row["step"]: row["loss"] for row in rows}


def plain_checksums(tree):
    """The checksums of a checkpoint, computed with NumPy."""
    sums = []
    for x in map(np.asarray, jax.tree.leaves(tree)):
        words = np.ascontiguousarray(x).view(np.uint32).ravel().astype(np.uint64)
        odd = 2 * np.arange(words.size, dtype=np.uint64) + 1
        sums.append(int((words * odd % 2**32).sum() % 2**32))
    return sums


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_and_they_resume(tmp_path, monkeypatch):
    file, workdir = tmp_path / "two.yaml", tmp_path / "run"
    config = with_training(CONFIG, steps=24)  # time for the signal to come before the last
    save_config(config, file)
    command = [sys.executable, str(LAUNCHER), "--processes", "2", "--devices", "4", "--restarts", "1"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([*command, "train", str(file), "--workdir", str(workdir)], stdout=out, stderr=err)
    end = time.time() + 200
    while 1 not in losses(workdir) and process.poll() is None and time.time() < end:
        time.sleep(0.01)
    second = re.search(r"local_processes: started \d+, (\d+)", (tmp_path / "err").read_text())[1]
    os.kill(int(second), signal.SIGTERM)
    process.wait(timeout=200)
    output, errors = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()

    assert process.returncode == 0, errors
    assert "local_processes: processes ended with 42, 42" in errors
    assert "restart 1 of at most 1" in errors
    steps = Checkpoints(workdir / "checkpoints", read_only=True).steps()
    assert len(steps) == 2
    assert 1 < steps[0] < steps[1] == config.training.steps
    assert f"stopped by SIGTERM after step {steps[0]}; checkpoint saved" in errors
    assert f"resuming {workdir} after step {steps[0]}" in errors
    assert "Traceback" not in errors
    # Only process 0 prints.
    assert output.count("trained to step 24") == 1
    assert errors.count("resuming") == 1
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 25))

    use_devices(monkeypatch, 1)
    train(config, tmp_path / "alone", progress=False)  # one process, one device, uninterrupted
    pairs = zip(losses(workdir).values(), losses(tmp_path / "alone").values(), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5

    # One process, with two devices and with one, restores exactly what the eight devices wrote.
    restored = []
    for count in (2, 1):
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:count])
        checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
        like = init_state(config, mesh)
        state, meta = checkpoints.restore_newest(like, check=lambda _: None)
        assert int(state.step) == 24
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state.variables)} == {count}
        restored.append(jax.device_get(state))
        assert plain_checksums(state.variables) == meta["checksums"]["model"]
    jax.tree.map(np.testing.assert_array_equal, *restored)


@pytest.mark.slow
def test_a_lora_run_with_a_teacher_goes_on_in_two_processes(tmp_path, monkeypatch):
    """Its base, and its teacher, which is a LoRA run itself, are loaded by both processes before its own checkpoint."""
    monkeypatch.chdir(tmp_path)
    use_devices(monkeypatch, 1)
    base = dataclasses.replace(CONFIG.model, loops=1, injection="none")
    save_pretrained("base", base, tiny.variables(base))
    lora = LoraConfig(rank=2, alpha=4.0)
    fields = {"steps": 1, "checkpoint_every": 2, "learning_rate": 0.1, "init_from": "base", "lora": lora}
    first = with_training(dataclasses.replace(CONFIG, model=base), **fields)
    train(first, "first", progress=False)
    second = with_training(first, steps=4, distillation=DistillationConfig(teacher="first"))
    train(second, "alone", progress=False)  # one process, one device, uninterrupted
    shutil.copytree("alone", "run")
    shutil.rmtree("run/checkpoints/4")
    save_config(second, "second.yaml")

    command = [sys.executable, str(LAUNCHER), "--processes", "2", "--devices", "4", "--restarts", "0"]
    result = subprocess.run(
        [*command, "train", "second.yaml", "--workdir", "run"], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "resuming run after step 2" in result.stderr
    assert losses("run").keys() == losses("alone").keys() == {1, 2, 3, 4}
    assert len(set(losses("run").values())) == 4
    assert max(abs(losses("run")[step] - losses("alone")[step]) for step in (3, 4)) < 1e-5


def test_what_needs_all_processes_is_refused_while_the_others_wait_for_process_0(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_single_process", lambda: False)
    monkeypatch.setattr(processes, "client", lambda: SimpleNamespace(key_value_set=lambda key, text: None))
    for work in (lambda: raise_together(list), lambda: Checkpoints(tmp_path / "checkpoints")):
        with pytest.raises(RuntimeError, match="all processes must do this at once"):
            process_zero_first("a file", work)
    process_zero_first("a file", list)
    monkeypatch.undo()
    Checkpoints(tmp_path / "checkpoints").close()  # not after it


def test_what_process_0_finds_is_told_to_the_others(monkeypatch):
    """Flags, numbers and texts, and what fails."""
    store = {}
    told = SimpleNamespace(key_value_set=store.__setitem__, blocking_key_value_get=lambda key, _: store[key])
    monkeypatch.setattr(processes, "is_single_process", lambda: False)
    monkeypatch.setattr(processes, "client", lambda: told)
    monkeypatch.setattr(processes, "_next_key", lambda: "key")

    def both(work):
        outcomes = []
        for zero in (True, False):
            monkeypatch.setattr(processes, "is_process_zero", lambda zero=zero: zero)
            try:
                outcomes.append(of_process_zero(work if zero else None))
            except Exception as error:
                outcomes.append((type(error), str(error)))
        return outcomes

    for value in (True, 7, "two words", None):
        assert both(lambda value=value: value) == [value, value]

    def fails(error):
        raise error

    for error in (ConfigError("no"), StorageError("gone"), TrainingError("nan")):
        assert both(lambda error=error: fails(error)) == [(type(error), str(error))] * 2
    assert both(lambda: fails(OSError("full"))) == [(OSError, "full"), (TrainingError, "process 0: full")]


def test_a_signal_before_the_first_step_of_a_resumed_run_is_not_passed_over(monkeypatch):
    """jax's service chooses the call after those that were made; it knows nothing of steps."""
    asked = []
    monkeypatch.setattr(processes, "is_single_process", lambda: False)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda call: asked.append(call) or call == 2)
    stop = processes.StopSignal()
    assert [stop.reached(), stop.reached()] == [None, signal.SIGTERM]
    assert asked == [1, 2]


def loops_over_sets(source):
    """The lines with a loop or comprehension over what is a set by its spelling."""

    def is_set(node):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd | ast.Sub | ast.BitXor):
            return is_set(node.left) or is_set(node.right)
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
        return isinstance(node, ast.Set | ast.SetComp) or called in ("set", "frozenset")

    return [n.iter.lineno for n in ast.walk(ast.parse(source)) if is_set(getattr(n, "iter", None))]


def test_no_loop_runs_over_a_set():
    """Their order differs between processes, which must start the same computations in the same order."""
    assert loops_over_sets("for x in {1} | a:\n    [y for y in set(x)]\nfor z in sorted(set(x)): pass") == [1, 2]
    package = LAUNCHER.parents[1] / "mythos_jax"
    found = {str(file): loops_over_sets(file.read_text()) for file in package.rglob("*.py")}
    assert not {file: lines for file, lines in found.items() if lines}


STEP = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_STEP_NODELIST": "gpu[007-009,11]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}


def test_the_cluster_is_read_from_slurms_variables():
    assert find_cluster(STEP) == Cluster("slurm", "gpu007:62344", 4, 2, None)  # 5000 mod 4096 + 61440
    shared = STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}
    assert find_cluster(shared).local_devices == (1,)
    bound = shared | {"CUDA_VISIBLE_DEVICES": "0"}  # Slurm has given the task one GPU
    assert find_cluster(bound).local_devices is None
    for nodes, first in [("a1,b2", "a1"), ("a1", "a1"), ("rack-2-n[3,5-9]", "rack-2-n3")]:
        assert find_cluster(STEP | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:62344"
    assert find_cluster(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_flags_take_precedence_over_variables_and_variables_over_slurm():
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find_cluster({}) is None
    assert find_cluster(variables | STEP) == Cluster("flags", "a:1", 2, 1)
    assert find_cluster(variables, "b:2", 3, 0) == Cluster("flags", "b:2", 3, 0)
    assert find_cluster({}, processes=1) is None


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"processes": 2}, r"--process-id: got None, allowed: 0 to 1"),
        ({"processes": 2, "process_id": 2}, r"--process-id: got 2, allowed: 0 to 1"),
        ({"processes": 2, "process_id": 0}, r"--coordinator: got None, allowed: HOST:PORT"),
        ({"processes": 2, "process_id": 0, "coordinator": "a"}, r"--coordinator: got a, allowed: HOST:PORT"),
        ({"process_id": 0}, r"--process-id: got 0 without --processes"),
        ({"coordinator": "a:1"}, r"--coordinator: got a:1 without --processes"),
        ({"processes": 0}, r"--processes: got 0, allowed: an integer >= 1"),
    ],
)
def test_an_incomplete_cluster_is_a_one_line_error(keywords, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster({}, **keywords)


def test_a_variable_that_is_not_a_number_is_named():
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES: got 'two'"):
        find_cluster({"JAX_NUM_PROCESSES": "two"})


def test_the_combined_exit_code_tells_whether_to_restart():
    assert combined_exit_code([0, 0]) == 0
    assert combined_exit_code([42, 42]) == combined_exit_code([-9, 42]) == combined_exit_code([0, -6]) == 42
    assert combined_exit_code([42, 1]) == 1
    assert combined_exit_code([2, 1, -9]) == 2


def test_dry_run_starts_nothing(capsys, tmp_path):
    assert main(["--processes", "2", "--dry-run", "train", "c.yaml", "--workdir", str(tmp_path / "w")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [f"JAX_PROCESS_ID={i}" in line for i, line in enumerate(lines[:2])] == [True, True]
    assert not (tmp_path / "w").exists()
