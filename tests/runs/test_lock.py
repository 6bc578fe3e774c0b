"""The lock of a run directory: one owner, which another start replaces when it is dead."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mythos_jax.errors import ConfigError, LockError
from mythos_jax.paths import to_path
from mythos_jax.runs import lock as lock_module
from mythos_jax.runs.lock import RunLock, Timing, locked
from mythos_jax.runs.owner import LOCK_FILE, Owner, parse_owner

FAST = Timing(renew=0.02, patience=0.6, ending=1.0, settle=0.05)
NEVER_RENEWED = dataclasses.replace(FAST, renew=1e6)  # so that no new file is about to replace the lock


def owner(**fields):
    return dataclasses.replace(Owner.this_process(), **fields)


def write(run_dir, owner):
    run_dir.mkdir(exist_ok=True)
    (run_dir / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(owner)))


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(params=["disk", "object store"])
def run_dir(request, tmp_path, monkeypatch):
    if request.param == "disk":
        return tmp_path / "run"
    from etils.epath import backend

    store = type("Store", (MemoryFileSystem,), {"store": {}, "pseudo_dirs": [""]})
    monkeypatch.setattr(
        store, "_strip_protocol", classmethod(lambda cls, path: path.removeprefix("gs:/")), raising=False
    )
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: store())
    return to_path("gs://bucket/run")


def test_the_second_is_refused_while_the_first_is_alive(run_dir):
    with locked(run_dir, FAST) as lock:
        with pytest.raises(
            LockError, match=rf"run: in use by process {os.getpid()} on .*; allowed: one training proce"
        ):
            locked(run_dir, FAST).__enter__()
        lock.check()
    with locked(run_dir, FAST):
        pass
    assert not (run_dir / LOCK_FILE).exists()


@pytest.mark.parametrize("dead", [lambda: owner(pid=ended_process()), lambda: owner(started="1")], ids=["pid", "start"])
def test_a_dead_owner_of_this_machine_is_replaced_at_once(run_dir, dead):
    """Its process has ended, or its number is now that of a process that started at another time."""
    write(run_dir, dead())
    with locked(run_dir, Timing(patience=1e6, settle=0.01)) as lock:
        lock.check()


def test_an_owner_that_was_killed_but_not_collected_by_its_parent_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Owner.this_process()
    try:
        zombie = owner(pid=process.pid, started="not known")
        assert zombie.is_alive(here.place) is False
        process.kill()
        stat = Path(f"/proc/{process.pid}/stat")
        while (fields := stat.read_text().rpartition(")")[2].split())[0] != "Z":
            time.sleep(0.01)
        assert dataclasses.replace(zombie, started=fields[19]).is_alive(here.place) is False
    finally:
        process.communicate()


def test_where_processes_cannot_be_seen_only_their_numbers_count(monkeypatch):
    """As on systems without /proc, or where the processes of other users are hidden."""
    here, ended = Owner.this_process(), ended_process()

    def hidden(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", hidden)
    assert dataclasses.replace(here, started="1").is_alive(here.place)
    assert owner(pid=1).is_alive(Owner.this_process().place)
    assert not owner(pid=ended).is_alive(Owner.this_process().place)


@pytest.mark.parametrize("content", ["foreign", "damaged", "empty"])
def test_an_owner_elsewhere_that_renews_nothing_is_replaced(run_dir, content, capsys):
    write(run_dir, owner(host="elsewhere", place="elsewhere", token="theirs", renewed=time.time() - 600))
    if content != "foreign":
        (run_dir / LOCK_FILE).write_bytes(b"\xff{" if content == "damaged" else b"")
    begin = time.monotonic()
    with locked(run_dir, FAST) as lock:
        assert time.monotonic() - begin >= FAST.patience
        lock.check()
    name = f"process {os.getpid()} on elsewhere, seen 6.. s ago" if content == "foreign" else "an unknown process"
    assert re.search(f"run: in use by {name}; waiting until that ends, or does not answer", capsys.readouterr().err)


class Clock:
    """Time that passes while somebody sleeps. each: is called after each sleep."""

    def __init__(self, each):
        self.now, self.each, self.time = 0.0, each, time.time

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.each(self)


@pytest.mark.parametrize("suspended", [False, True])
def test_an_owner_elsewhere_that_renews_is_left_alone(run_dir, monkeypatch, suspended):
    """Also if both were suspended for an hour, and the start goes on first."""
    theirs, renewed = RunLock(run_dir, Timing(renew=1e6, settle=0.0)), [0.0]

    def each(clock):
        if suspended and 25 < clock.now < 3600:
            clock.now += 3600
        elif clock.now >= renewed[-1] + 10:
            theirs.check()
            renewed.append(clock.now)

    monkeypatch.setattr(lock_module, "time", Clock(each))
    theirs._me = owner(host="elsewhere", place="elsewhere", token="theirs")
    run_dir.mkdir(parents=True, exist_ok=True)
    theirs.acquire()
    try:
        with pytest.raises(LockError, match=r"in use by process .* on elsewhere"):
            locked(run_dir, Timing()).__enter__()
        assert len(renewed) > 15
        theirs.check()
    finally:
        theirs.release()


def test_an_owner_elsewhere_that_ends_meanwhile_is_replaced(run_dir):
    """As when a job starts again while its old processes still save."""
    theirs = RunLock(run_dir, FAST)
    theirs._me = owner(host="elsewhere", place="elsewhere", token="theirs")
    run_dir.mkdir(parents=True, exist_ok=True)
    theirs.acquire()
    threading.Timer(0.1, theirs.release).start()
    with locked(run_dir, dataclasses.replace(FAST, patience=3, ending=1e3)) as lock:
        lock.check()


def test_an_owner_that_was_suspended_learns_that_it_was_replaced(run_dir):
    """The thief's lock is neither overwritten nor released by the former owner."""
    thief = owner(token="thief", pid=1, host="elsewhere")
    with locked(run_dir, Timing(settle=0.01)) as lock:
        write(run_dir, thief)
        with pytest.raises(LockError, match=r"process 1 on elsewhere, .* has taken this run over"):
            lock.check()
    assert json.loads((run_dir / LOCK_FILE).read_text())["token"] == "thief"


def test_one_of_many_starts_wins(tmp_path):
    """All of them find the lock of a dead owner."""
    write(tmp_path, owner(started="1"))
    locks, outcomes = [RunLock(tmp_path, FAST) for _ in range(8)], []

    def start(lock):
        try:
            lock.acquire()
            outcomes.append("won")
        except LockError:
            outcomes.append("refused")

    threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lock in locks:
        lock.release()
    assert sorted(outcomes) == ["refused"] * 7 + ["won"]
    assert not list(tmp_path.iterdir())


def test_a_start_that_was_held_up_does_not_take_over_from_the_one_that_was_faster(tmp_path, monkeypatch):
    """It has found the owner dead; before it acts, another start has replaced that owner, or come and gone."""
    late, fast, next_one = (RunLock(tmp_path, NEVER_RENEWED) for _ in range(3))
    write(tmp_path, owner(started="1"))
    wait, calls = late._wait_for_death, []

    def held_up(path):
        dead = wait(path)
        if not calls:
            fast.acquire()
        calls.append(path)
        return dead

    monkeypatch.setattr(late, "_wait_for_death", held_up)
    with pytest.raises(LockError, match="in use by"):
        late.acquire()
    assert len(calls) == 1  # the second call raised
    fast.check()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    fast.release()
    next_one.acquire()
    next_one.release()
    assert not list(tmp_path.iterdir())


def test_a_successor_that_died_before_it_replaced_the_lock_has_a_successor(tmp_path):
    dead = [owner(started="1"), owner(started="2"), owner(started="3")]
    write(tmp_path, dead[0])
    lock = RunLock(tmp_path, NEVER_RENEWED)
    claims = [lock._claim(json.dumps(dataclasses.asdict(each)).encode()) for each in dead]
    for claim, claimant in zip(claims, dead[1:], strict=False):
        claim.write_text(json.dumps(dataclasses.asdict(claimant)))
    lock.acquire()
    lock.check()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    lock.release()


def test_a_start_waits_for_a_successor_that_lives(tmp_path):
    write(tmp_path, owner(started="1"))
    lock, successor = RunLock(tmp_path, FAST), owner()
    claim = lock._claim((tmp_path / LOCK_FILE).read_bytes())
    claim.write_text(json.dumps(dataclasses.asdict(successor)))
    with pytest.raises(LockError, match=f"in use by process {successor.pid} on"):
        lock.acquire()
    assert parse_owner(claim.read_bytes()) == successor


def test_a_lock_that_somebody_deleted_is_made_again(run_dir):
    with locked(run_dir, Timing(settle=0.01)) as lock:
        (run_dir / LOCK_FILE).unlink()
        lock.check()
        assert (run_dir / LOCK_FILE).exists()


def test_an_object_store_that_fails_for_a_moment_does_not_end_the_renewals(run_dir, monkeypatch):
    fails, read = [True], lock_module.read_if_there

    def reading(path):
        if not fails:
            return read(path)
        fails.append(True)
        raise RuntimeError("503")  # as gcsfs: no OSError

    with locked(run_dir, FAST) as lock:
        monkeypatch.setattr(lock_module, "read_if_there", reading)
        lock.check()
        while len(fails) < 3 and lock._renewing.is_alive():
            time.sleep(0.01)
        fails.clear()
        before, end = lock._me.renewals, time.monotonic() + 60
        while lock._me.renewals == before and time.monotonic() < end:
            time.sleep(0.01)
        assert lock._renewing.is_alive()
        assert lock._me.renewals > before


def test_a_new_directory_in_which_nothing_was_written_is_deleted(tmp_path):
    with locked(tmp_path / "run", FAST):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run", FAST):
        (tmp_path / "run" / "config.yaml").write_text("")
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: cannot be written .Not a directory.; allowed: a --workdir that"):
        locked(tmp_path / "file" / "run", FAST).__enter__()
