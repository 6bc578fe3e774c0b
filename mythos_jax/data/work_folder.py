"""The folder that `prepare` works in: resumable after a kill, exclusive among processes, removed when done."""

import contextlib
import glob
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock

from mythos_jax.streams import log

_LOCK_FILE = "lock"
_NEW_FOLDER_SECONDS = 3600  # a folder without a lock file is left alone for this long: it may be about to get one


@contextlib.contextmanager
def work_folder(out: Path, request: str) -> Iterator[Path]:
    """A locked folder next to `out`, which may hold the work of a killed run of the same `request` (a hash).

    It is deleted on success. After an error it remains if it holds finished units, after a kill or Ctrl-C in any case.
    If another process is working on the same request, or the file system has no locks, this process gets a folder of
    its own: both do the whole work, and whichever finishes first provides the result.
    """
    folder = out.with_name(f"{out.name}.partial-{request}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _try_lock(folder)
    if lock is None or not (folder / _LOCK_FILE).exists():  # its last owner may have deleted it meanwhile
        # Under a name that nobody looks for until it is locked: another process might take it for abandoned.
        folder, hidden = _own_folder(folder)
        lock = _try_lock(hidden)  # still None if the file system has no locks
        hidden.rename(folder)
    try:
        _delete_abandoned(out, folder)
        yield folder
    except BaseException as error:
        units = len(list(folder.glob("units/*.npz")))
        if not any(folder.glob("shards/*.json")):  # what workers have written is used again (part_worker.py)
            shutil.rmtree(folder / "rows", ignore_errors=True)
        if units:
            log(f"{units} tokenized unit{'s' * (units > 1)} kept in {folder}; the same command goes on from there")
        elif isinstance(error, Exception):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if lock is not None:
            lock.release()


def _own_folder(folder: Path) -> tuple[Path, Path]:
    """A name that no other process has, and a new folder under another such name."""
    name = f"{folder.name}-{uuid.uuid4().hex[:8]}"
    hidden = folder.with_name(f".{name}")
    hidden.mkdir()
    return folder.with_name(name), hidden


def _try_lock(folder: Path) -> BaseFileLock | None:
    """Locks `folder` until release or the end of this process; None if another process has it, or locks do not work."""
    lock = FileLock(folder / _LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except (OSError, NotImplementedError):  # filelock.Timeout is an OSError
        return None
    return lock


def _delete_abandoned(out: Path, own: Path) -> None:
    """Deletes the work folders of `out` that killed runs, of this or other requests, have left."""
    for folder in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        if folder == own or not folder.is_dir():
            continue
        if not (folder / _LOCK_FILE).exists():
            if time.time() - folder.stat().st_mtime >= _NEW_FOLDER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        elif (lock := _try_lock(folder)) is not None:  # its process has ended
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
