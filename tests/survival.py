"""Runs that are killed, or moved to other devices, compared with an uninterrupted run.

    python -m tests.survival                       20 SIGKILLs and SIGTERMs at random moments
    python -m tests.survival --local 3             the same, with local checkpoints every 3 steps
    python -m tests.survival --local 3 --processes 2 [--fsdp 2]
                                                   two processes as two hosts: one of them is killed, and afterwards its
                                                   local disk is lost, or both change places
    python -m tests.survival --devices 1,2,8       moved from 1 to 2 to 8 simulated CPU devices

`tests/training/test_train.py` uses the helpers for short versions of both.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from mythos_jax.config import (
    Config,
    DataConfig,
    DepthConfig,
    LocalCheckpointsConfig,
    MeshConfig,
    TrainingConfig,
    save_config,
)
from mythos_jax.data.open import open_data
from mythos_jax.data.placement import batch_sharding, local_rows, to_global
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.runs.load import load_model
from mythos_jax.sharding import make_mesh

LAUNCHER = Path(__file__).parents[1] / "launch" / "local_processes.py"
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 42, signal.SIGINT: 130}
# Bounds on the loss of a moved run, in nats per token: for the first steps after a restore, compared with the same
# checkpoint continued on its old devices; and for all steps, compared with the run that was never moved.
FIRST, FIRST_BOUND, DRIFT_BOUND = 5, 1e-5, 1e-4


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    """Rows of the log without what depends on the speed of the machine."""
    timed = ("time", "tokens_per_second", "flops_per_second", "mfu", "goodput", "data_wait", "step_seconds", "hbm")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if "slow_process" not in row]


def with_training(config, **fields):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **fields))


def parameters(workdir):
    return jax.device_get(load_model(workdir).variables)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def start(config, workdir, within=(), devices=1, processes=1):
    """Starts `mythos train` in processes of its own, as a user would. within: the words of a command that runs it."""
    file = workdir.parent / f"{workdir.name}.yaml"
    save_config(config, file)
    program = ["-m", "mythos_jax"]
    if processes > 1:
        program = [str(LAUNCHER), "--processes", str(processes), "--devices", "1", "--restarts", "0", "--grace", "30"]
    command = [*within, sys.executable, *program, "train", str(file), "--workdir", str(workdir)]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for_step(workdir, step, process, seconds=300):
    """Waits until the log of a run contains a step."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        log = workdir / "metrics.jsonl"
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def stop(process, number):
    """Sends the signal; returns the standard error of the process, whose exit code must be the documented one."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == CODES[number], errors
    assert "Traceback" not in errors, errors
    return errors


def finish(config, workdir, devices=1, processes=1):
    """Returns the standard error."""
    process = start(config, workdir, devices=devices, processes=processes)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def stop_one(process, number, member):
    """Sends the signal to one of several processes, which end all of them. Returns the standard error."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) <= member:
        time.sleep(0.01)
    os.kill(int(children.read_text().split()[member]), number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 42, errors
    return errors


def last_step(workdir):
    """The last step with a complete line in the log; 0 if there is none."""
    if not (workdir / "metrics.jsonl").exists():
        return 0
    rows = (workdir / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return json.loads(rows[-1])["step"] if rows else 0


def kill_often(config, folder, kills, seed, processes=1):
    """Stops a run at `kills` random moments and compares arrays, optimizer and log with an uninterrupted run."""
    draw, local = random.Random(seed), config.training.local_checkpoints
    uninterrupted, workdir = folder / "uninterrupted", folder / "killed"
    finish(with_training(config, local_checkpoints=LocalCheckpointsConfig()), uninterrupted, processes=processes)
    print(f"{'':>3} {'signal':>8} {'after step':>10} {'newest checkpoint':>18} {'resumed after':>14} {'':>8} then")
    last, lost, begun, then, before = 0, [], [], "", None
    for i, step in enumerate(sorted(draw.sample(range(1, config.training.steps * 9 // 10), kills))):
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        process = start(config, workdir, processes=processes)
        if last and draw.random() < 0.2:  # during start-up, where SIGTERM has the effect of SIGKILL
            number = signal.SIGKILL
            time.sleep(draw.uniform(0, 3))
        else:
            wait_for_step(workdir, max(step, last + 1), process)
            time.sleep(draw.uniform(0, 0.1))  # during a step or a save
        errors = stop(process, number) if processes == 1 else stop_one(process, number, draw.randrange(processes))
        begun += resumed(errors, last, before, then, lost)
        last, before = last_step(workdir), number
        saved = Checkpoints(workdir / "checkpoints", read_only=True).newest() if last else None
        where = begun[-1] if begun and "resuming" in errors else ("", "")
        then = damage_hosts(draw, local, folder, config) if processes > 1 else ""
        print(f"{i + 1:>3} {number.name:>8} {last:>10} {saved!s:>18} {where[0]!s:>14} {where[1]:>8} {then}", flush=True)
    begun += resumed(finish(config, workdir, processes=processes), last, before, then, lost)
    a, b = ({"variables": parameters(path), "log": timeless(lines(path))} for path in (uninterrupted, workdir))
    assert_same(a["variables"], b["variables"])
    assert a["log"] == b["log"]
    sums = [final_checksums(path, config.training.steps) for path in (uninterrupted, workdir)]
    assert sums[0] == sums[1]
    arrays = sum(map(len, sums[0].values()))
    print(
        f"{kills} kills in {config.training.steps} steps: {arrays} arrays, including the optimizer's, are bit-identical"
    )
    if local.folder:
        print(f"{len(begun)} starts resumed, {sum(place == 'locally' for _, place in begun)} of them locally")
        print(f"steps lost by a SIGKILL whose local checkpoints remained: {sorted(lost)}")
        assert max(lost) <= 2 * local.every  # one save may be under way


def resumed(errors, last, number, then, lost):
    """Where a start went on, (step, "locally" or ""); [] if it was killed before. Adds to the steps that were lost."""
    found = re.search(r"resuming .* after step (\d+)(, from local)?", errors)
    if found is None:
        return []
    if number == signal.SIGKILL and "lost for good" not in then:
        lost.append(last - int(found[1]))
    return [(int(found[1]), "locally" if found[2] else "")]


def damage_hosts(draw, local, folder, config):
    """What happens to the disks of the two hosts while the run is down."""
    hosts = [folder / "local" / str(i) for i in range(2)]
    what = draw.choice(["", "swapped", "lost"])
    if not local.folder or not all(host.is_dir() for host in hosts):
        return ""
    if what == "swapped":
        hosts[0].rename(folder / "local" / "aside")
        hosts[1].rename(hosts[0])
        (folder / "local" / "aside").rename(hosts[1])
    elif what == "lost":
        shutil.rmtree(hosts[draw.randrange(2)])
        what = "lost for good" if config.mesh.fsdp == 2 else "lost"
    return what


def final_checksums(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["checksums"]


def move(config, folder, counts):
    """Moves a run to other numbers of devices at equal intervals; compares it with one that stays on the first."""
    unmoved, workdir = folder / "unmoved", folder / "moved"
    finish(config, unmoved, counts[0])
    total = config.training.steps
    ends = [total * (i + 1) // len(counts) for i in range(len(counts))]
    print(f"{'devices':>8} {'from step':>10} {f'first {FIRST} steps':>14} {'largest drift':>14}")
    for i, (devices, end) in enumerate(zip(counts, ends, strict=True)):
        begin = Checkpoints(workdir / "checkpoints", read_only=True).newest() if i else 0
        stayed = folder / f"stayed_{i}"
        if i:
            shutil.copytree(workdir, stayed)
            finish(with_training(config, steps=begin + FIRST), stayed, counts[i - 1])
        process = start(config, workdir, devices=devices)
        if end < total:
            wait_for_step(workdir, end, process, seconds=900)
            stop(process, signal.SIGTERM)
        else:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        moved_loss, unmoved_loss = loss_by_step(workdir), loss_by_step(unmoved)
        drift = max(abs(moved_loss[s] - unmoved_loss[s]) for s in moved_loss if s > begin)
        first = 0.0
        if i:
            stayed_loss = loss_by_step(stayed)
            first = max(abs(moved_loss[s] - stayed_loss[s]) for s in range(begin + 1, begin + FIRST + 1))
        print(f"{devices:>8} {begin:>10} {first:>14.1e} {drift:>14.1e}", flush=True)
        assert_same_batches(config, counts, begin)
        assert first <= FIRST_BOUND
        assert drift <= DRIFT_BOUND
    # Depths are drawn for the global batch and the mean is over its tokens, so it does not depend on the devices.
    loops = [[row["mean_loops"] for row in lines(path)] for path in (unmoved, workdir)]
    np.testing.assert_allclose(*loops, rtol=1e-6)
    print(f"bounds: {FIRST_BOUND} on the first {FIRST} steps after a restore, {DRIFT_BOUND} throughout")


def loss_by_step(workdir):
    return {row["step"]: row["loss"] for row in lines(workdir)}


def assert_same_batches(config, counts, step):
    """The global batch after a step is the same on every number of devices."""
    data, size = open_data(config, progress=False), config.training.batch_size
    global_batches = []
    for count in counts:
        sharding = batch_sharding(make_mesh(config.mesh, jax.local_devices()[:count]))
        rows = local_rows(sharding, size)
        batch = next(data.train_batches(batch_size=size, seed=config.training.seed, start_step=step, rows=rows))
        global_batches.append(jax.device_get(to_global(sharding, size, rows, batch)))
    for other in global_batches[1:]:
        assert_same(global_batches[0], other)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--devices", help="for example 1,2,8: move the run instead of killing it")
    parser.add_argument("--local", type=int, default=0, metavar="N", help="local checkpoints every N steps")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=1, help="2: each of two processes has half of the state")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and signals")
    arguments = parser.parse_args()
    import tests.conftest  # noqa: F401  sets up eight devices and the compilation cache, also for the processes started here
    from tests.tiny import TRAINED

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = str(folder / "local" / "$JAX_PROCESS_ID") if arguments.processes > 1 else str(folder / "local")
        local = LocalCheckpointsConfig(own if arguments.local else "", arguments.local or 1)
        config = Config(
            name="survival",
            model=TRAINED,
            training=TrainingConfig(
                steps=arguments.steps,
                batch_size=8,
                checkpoint_every=100 if arguments.local else 20,
                local_checkpoints=local,
                log_every=1,
                warmup_steps=10,
                schedule="constant",
                ema_decay=0.9,
                depth=DepthConfig(distribution="poisson", backprop_loops=2),
            ),
            data=DataConfig(
                path=str(folder / "data"), sources=("stdlib",), max_bytes=300_000, held_out_fraction=0.0, seq_len=16
            ),
            mesh=MeshConfig(data=-1, fsdp=arguments.fsdp),
        )
        if arguments.devices:
            move(config, folder, [int(count) for count in arguments.devices.split(",")])
        else:
            kill_often(config, folder, arguments.kills, arguments.seed, arguments.processes)


if __name__ == "__main__":
    main()
