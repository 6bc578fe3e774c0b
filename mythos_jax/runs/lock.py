"""One training process per run directory: a lock file that its owner renews and that outlives no dead owner.

The file `lock.json` names its owner: host, process, and a random token. A start that finds the file takes it over if
its owner is dead. On the same machine the process table says so at once; for an owner elsewhere, a start watches
whether the file is still renewed. Only plain file operations are used, so that it works on network file systems, and in
object stores, where a file cannot be created exclusively: there, a start waits and reads back what it wrote.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from mythos_jax.errors import ConfigError, LockError
from mythos_jax.paths import is_remote, read_if_there, write_whole
from mythos_jax.processes import log0
from mythos_jax.runs.owner import LOCK_FILE, PATIENCE, RENEW, Owner, parse_owner


@dataclass(frozen=True)
class Timing:
    """Seconds. renew: between two renewals by the owner. patience: without a renewal after which an owner elsewhere
    counts as dead; a multiple of `renew`. ending: that such an owner may go on renewing, because it may be about to
    end; more than the launchers' grace period. settle: until a write to an object store is read back."""

    renew: float = RENEW
    patience: float = PATIENCE
    ending: float = 200.0
    settle: float = 2.0


@contextlib.contextmanager
def locked(run_dir: Any, timing: Timing | None = None) -> Iterator["RunLock"]:
    """Makes the run directory if it is missing and holds its lock. Nothing in the directory is touched before.

    A directory that was made here and in which nothing was written is deleted again.
    Raises ConfigError if the directory cannot be written, LockError if another process trains in it.
    """
    lock = RunLock(run_dir, timing or Timing())
    try:
        is_new = not is_remote(run_dir) and not run_dir.exists()
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"{run_dir}: cannot be written ({error.strerror or error}); allowed: a --workdir that can be"
        ) from None
    try:
        yield lock
    finally:
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                run_dir.rmdir()


class RunLock:
    """The lock of one run directory; see `locked`."""

    def __init__(self, run_dir: Any, timing: Timing) -> None:
        self._run_dir, self._file, self._timing = run_dir, run_dir / LOCK_FILE, timing
        self._me = Owner.this_process()
        self._stop, self._writing = threading.Event(), threading.Lock()
        self._renewing = threading.Thread(target=self._renew_until_stopped, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Raises LockError if the lock's owner is alive, OSError if the directory cannot be written."""
        create = self._create_remote if is_remote(self._file) else partial(self._create, self._file)
        while not create():
            dead = self._wait_for_death(self._file)
            if dead is not None and self._take_over(dead):
                break
        self._renewing.start()

    def check(self) -> None:
        """Raises LockError if another process has taken the lock over, as it may if this one was suspended."""
        if taken_by := self._renew():
            raise LockError(
                f"{self._run_dir}: {taken_by} has taken this run over, because this process did not answer for a "
                "while; nothing more is saved here"
            )

    def release(self) -> None:
        """Deletes the file if it is this process's."""
        self._stop.set()
        if self._renewing.ident is not None:
            self._renewing.join()
        with contextlib.suppress(Exception):  # as in `_renew`; a lock that stays is that of a dead process soon
            if self._owner() is None:
                self._file.unlink()

    def _create(self, path: Any) -> bool:
        """Makes a file that names this process in one go, so that nobody sees it empty; False if it exists."""
        temporary = self._run_dir / f".{LOCK_FILE}.{self._me.token}"
        temporary.write_bytes(self._content())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively(path)
        finally:
            temporary.unlink()
        return True

    def _create_exclusively(self, path: Any) -> bool:
        try:
            with open(path, "xb") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def _create_remote(self) -> bool:
        if read_if_there(self._file) is None:
            self._file.write_bytes(self._content())
            time.sleep(self._timing.settle)
        return read_if_there(self._file) == self._content()

    def _wait_for_death(self, path: Any) -> bytes | None:
        """Returns what a file held last when its owner is dead; None if it has another owner, or none, by now.

        Raises LockError if the owner is alive.
        """
        found = read_if_there(path)
        if found is None:
            return None
        owner = parse_owner(found)
        alive = owner and owner.is_alive(self._me.place)
        if alive is None:
            log0(
                f"{self._run_dir}: in use by {owner or 'an unknown process'}; waiting until that ends, or does not "
                f"answer for {self._timing.patience:.0f} s"
            )
            return self._watch(path, found)
        if alive:
            raise self._in_use(owner)
        return found

    def _watch(self, path: Any, found: bytes) -> bytes | None:
        """`_wait_for_death` of an owner elsewhere. Time in which this process does not look does not count: it may be
        suspended, and the owner with it."""
        turn = self._timing.patience / 35
        watched, quiet, now = 0.0, 0.0, time.monotonic()
        while quiet < self._timing.patience:
            owner = parse_owner(found)
            if watched > self._timing.ending:
                raise self._in_use(owner)
            time.sleep(turn)
            before, now = now, time.monotonic()
            passed = min(now - before, 5 * turn)
            watched, quiet = watched + passed, quiet + passed
            content = read_if_there(path)
            if content is None:
                return None
            if content != found:
                after = parse_owner(content)
                if owner is None or after is None or owner.token != after.token:
                    return None
                found, quiet = content, 0.0
        return found

    def _in_use(self, owner: Owner | None) -> LockError:
        return LockError(
            f"{self._run_dir}: in use by {owner or 'another process'}; allowed: one training process per run "
            "directory, so end that one or choose another --workdir"
        )

    def _take_over(self, dead: bytes) -> bool:
        """Replaces the file of a dead owner, given what it held last; False if another start was faster.

        Of several starts that find the same dead owner, one is its successor: the one that makes the file which is
        named after what the dead owner wrote last. A successor that died before it replaced the lock has a successor
        in the same way. Such a file counts only while the lock is still the dead owner's.
        """
        if is_remote(self._file):
            if read_if_there(self._file) == dead:
                self._file.unlink()
            return False
        claims = [self._claim(dead)]
        while not self._create(claims[-1]):
            died = self._wait_for_death(claims[-1])
            if died is None:
                return False
            claims.append(self._claim(died))
        is_successor = read_if_there(self._file) == dead
        if is_successor:
            write_whole(self._file, self._content())
        for claim in claims:
            claim.unlink(missing_ok=True)
        return is_successor

    def _claim(self, dead: bytes) -> Any:
        return self._run_dir / f".{LOCK_FILE}.after.{hashlib.sha256(dead).hexdigest()[:16]}"

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._timing.renew):
            if self._renew():
                return

    def _renew(self) -> Owner | None:
        """Rewrites the file with a new count; returns the owner instead if that is another process by now."""
        # A passing failure of the file system, or of an object store, whose clients have exceptions of their own; the
        # next renewal tries again.
        with self._writing, contextlib.suppress(Exception):
            if owner := self._owner():
                return owner
            self._me = replace(self._me, renewals=self._me.renewals + 1, renewed=time.time())
            write_whole(self._file, self._content())
        return None

    def _owner(self) -> Owner | None:
        """The owner that the file names, if it is another process."""
        found = read_if_there(self._file)
        owner = None if found is None else parse_owner(found)
        return None if owner is None or owner.token == self._me.token else owner

    def _content(self) -> bytes:
        return json.dumps(asdict(self._me)).encode()
