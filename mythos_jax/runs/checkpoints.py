"""Saving and restoring checkpoints of a run directory with Orbax.

A checkpoint has separate items, so that evaluation reads only what it needs: `model` (params and balance, or low-rank
weights alone), `average` (moving average of the weights, if one is kept), `optimizer`, and `meta` (a description of the
run and the checksums of the arrays, as JSON with a digest of itself). Orbax writes into a temporary directory and
renames it once it is complete, so a half-written checkpoint is never seen.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mythos_jax.errors import ConfigError, DamagedError, SaveError, UnreadableError, one_line
from mythos_jax.paths import is_remote, to_path
from mythos_jax.processes import (
    is_process_zero,
    log0,
    lost_a_process,
    process_zero_first,
    raise_together,
    require_all_processes,
)
from mythos_jax.runs.fingerprint import bits_and_index
from mythos_jax.runs.orbax_threads import in_daemon_thread, quiet_orbax
from mythos_jax.runs.state import TrainState, eval_variables, trained_collection


def newest_folder(directory: Any) -> int | None:
    """The step of the newest folder that looks like a checkpoint, or None. Unlike `Checkpoints`, it makes nothing and
    reads no file."""
    folders = directory.iterdir() if directory.is_dir() else []
    return max((int(path.name) for path in folders if path.name.isdecimal() and (path / "meta").is_dir()), default=None)


def newest_meta(directory: Any) -> dict[str, Any]:
    """The meta of the newest checkpoint that has an undamaged one; empty if there is none."""
    if newest_folder(directory) is None:
        return {}
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        for step in reversed(checkpoints.steps()):
            with contextlib.suppress(Exception):  # Orbax raises many kinds; who restores it says what is wrong
                return checkpoints._meta(step)
    finally:
        checkpoints.close()
    return {}


class Checkpoints:
    """The checkpoints of one run directory, written in the background; only the newest `keep` are kept.

    read_only: for evaluation. Raises ConfigError if there are none to read, or if the directory cannot be written.
    """

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False):
        self.directory = to_path(directory) if is_remote(directory) else Path(directory).absolute()
        require_all_processes(f"checkpoints in {self.directory}")  # Orbax waits for them, also when it only reads
        if read_only and not self.directory.is_dir():
            raise ConfigError(
                f"{self.directory.parent}: has no checkpoints; allowed: the directory of a run that saved one"
            )
        if not read_only and not is_remote(directory):
            _check_writable(self.directory)
        with quiet_orbax():
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=not read_only,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._has_failed, self._earlier_threads = False, set(threading.enumerate())

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> bool:
        """Starts writing the state under its step. Writes nothing and returns False if any of it is NaN or infinite.

        Raises SaveError if this save or the previous one failed.
        """
        step = int(state.step)
        if step in self.steps():
            return True
        self.check_space(state)
        if (whole := with_checksums(state, meta)) is None:
            return False
        trees, meta = whole
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        arguments = ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
        self._guard(lambda: in_daemon_thread(lambda: self._manager.save(step, args=arguments)))
        return True

    def is_saving(self) -> bool:
        """Whether a save is being written in the background."""
        running: bool = self._manager.is_saving_in_progress()
        return running

    def wait(self) -> None:
        """Blocks until all saves are on disk. Raises SaveError if one failed."""
        self._guard(self._manager.wait_until_finished)

    def restore_newest(
        self, like: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        """The newest undamaged state, with the shapes, dtypes and shardings of `like`, and its meta.

        check: receives the meta before any array is read, and raises ConfigError if the state is not for this run.

        A checkpoint that is not whole, or whose checksums are not those it was saved with, is renamed to STEP.damaged
        with a warning, and the previous one is tried. Raises DamagedError if none is left, and UnreadableError, without
        touching anything, if that is not the checkpoint's fault.
        """
        for step in reversed(self.steps()):
            try:
                meta = raise_together(partial(self._meta, step))
                check(meta)
                return self._restore_state(step, like, meta["checksums"]), meta
            except ConfigError:  # from `check`: the checkpoint itself is fine
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds
                self._raise_unless_damaged(step, error)
                reason = one_line(error, limit=200)
                log0(
                    f"warning: {self.directory / str(step)}: damaged, trying the previous one ({reason})",
                    logging.WARNING,
                )
                self._set_aside(step)
        raise DamagedError(f"{self.directory}: no undamaged checkpoint; they were renamed to STEP.damaged")

    def restore_variables(
        self, step: int, like: dict[str, Any], check: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The variables to evaluate at `step`, sharded like `like`, and the meta of the checkpoint. If a moving average
        of the weights was kept, it is what is evaluated. check: as for `restore_newest`.

        Raises DamagedError if the files do not hold what was saved, UnreadableError if they cannot be read now.
        """
        try:
            meta = self._meta(step)
            check(meta)
            sums = meta["checksums"]
            variables = self._restore_tree(step, "model", like, sums)
            if "average" in sums:
                average = self._restore_tree(step, "average", like[trained_collection(like)], sums)
                variables = eval_variables(variables, average)
        except ConfigError:  # from `check`
            raise
        except Exception as error:
            self._raise_unless_damaged(step, error)
            reason = one_line(error, limit=200)
            raise DamagedError(f"{self.directory / str(step)}: damaged, cannot be restored ({reason})") from error
        return variables, meta

    def _raise_unless_damaged(self, step: int, error: Exception) -> None:
        """Raises if the checkpoint may be whole: the error is not about what its files hold."""
        if lost_a_process(error):
            raise error
        if _NOT_DAMAGE.search(str(error)) or isinstance(error, MemoryError | PermissionError | TimeoutError):
            reason = one_line(error, limit=200)
            raise UnreadableError(
                f"{self.directory / str(step)}: cannot be read, nothing was changed ({reason})"
            ) from error

    def _meta(self, step: int) -> dict[str, Any]:
        """The item `meta`, checked against its digest."""
        return checked_meta(self._restore(step, meta=ocp.args.JsonRestore())["meta"])

    def _restore_state(self, step: int, like: TrainState, sums: dict[str, list[int]]) -> TrainState:
        items = {name: self._restore_tree(step, name, tree, sums) for name, tree in items_of(like).items()}
        return with_items(like, step, items)

    def _restore_tree(self, step: int, name: str, like: Any, sums: dict[str, list[int]]) -> Any:
        """One item, checked against the checksums it was saved with."""
        tree = raise_together(lambda: self._restore(step, **{name: ocp.args.StandardRestore(abstract(like))}))[name]
        check_sums(name, tree, sums)
        return tree

    def _set_aside(self, step: int) -> None:
        def rename() -> None:
            if is_process_zero():
                (self.directory / str(step)).rename(self.directory / f"{step}.damaged")

        with quiet_orbax():
            self._manager.wait_until_finished()
            process_zero_first("checkpoint", rename)
            self._manager.reload()

    def close(self) -> None:
        """Raises SaveError if a save failed and nothing has said so yet."""
        if not self._has_failed:
            self._guard(self._manager.close)
            return
        with contextlib.suppress(Exception):  # Orbax raises the error once more
            self._guard(self._manager.close)
        # Threads that are not stuck end within a moment; Python must not shut down under them.
        end = time.monotonic() + _THREADS_END
        while set(threading.enumerate()) - self._earlier_threads and time.monotonic() < end:
            time.sleep(0.05)

    def _restore(self, step: int, **items: Any) -> Any:
        with quiet_orbax():
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def check_space(self, state: TrainState) -> None:
        """Refuses a save that does not fit on a local disk before half of it is written."""
        if is_remote(self.directory):
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise SaveError(f"{self.directory}: checkpoint could not be written: {error.strerror}") from error
        if needed >= free:
            raise SaveError(
                f"{self.directory}: checkpoint could not be written: needs {needed / 2**20:.1f} MiB, "
                f"{free / 2**20:.1f} MiB are free"
            )

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            with quiet_orbax():
                write()
        except Exception as error:
            # Orbax and TensorStore raise many kinds; the user needs one line with the place and the cause.
            self._has_failed = True
            cause = one_line(error, limit=300)
            raise SaveError(f"{self.directory}: checkpoint could not be written: {cause}") from error


def _check_writable(directory: Path) -> None:
    """Raises ConfigError if no folder can be made there, which is what a save begins with."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".probe-", dir=directory)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"{directory}: cannot be written ({error.strerror or error}); allowed: a --workdir that can be"
        ) from None


_THREADS_END = 2  # seconds that the threads of a failed save are given to end

# Errors that say nothing about the files: status words of TensorStore, jax and storage, and error numbers for
# permission, input and output, memory, open files, time and stale file handles.
_NOT_DAMAGE = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED"
    r"|\[Errno (1|5|12|13|23|24|110|116)\]"
)


def with_checksums(state: TrainState, meta: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What is saved, by item, and the meta with the checksums of its arrays; None if any of it is NaN or infinite."""
    trees = items_of(state)
    if not is_finite(trees):
        return None
    sums = {name: jax.device_get(checksums(tree)) for name, tree in trees.items()}
    meta = {**meta, "checksums": {name: [int(x) for x in values] for name, values in sums.items()}}
    return trees, {**meta, "digest": digest(meta)}


def checked_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """The meta. Raises DamagedError if it is not what `with_checksums` made."""
    # Checkpoints written before digests were introduced have none.
    if "digest" in meta and meta["digest"] != digest(meta):
        raise DamagedError("meta is damaged: its digest is not the one that was saved")
    return meta


def check_sums(name: str, tree: Any, sums: Mapping[str, list[int]]) -> None:
    """Raises DamagedError if the item `name` is not what was saved. sums: those of its meta."""
    if jax.device_get(checksums(tree)).tolist() != sums[name]:
        raise DamagedError(f"{name} is damaged: its checksums are not the ones that were saved")


def with_items(like: TrainState, step: int, items: dict[str, Any]) -> TrainState:
    """The state whose items these are."""
    at = jax.device_put(jnp.asarray(step, like.step.dtype), like.step.sharding)
    return like.replace(step=at, variables=items["model"], average=items.get("average"), **items["optimizer"])


def items_of(state: TrainState) -> dict[str, Any]:
    """What is saved, by item; `meta` comes on top."""
    items = {
        "model": state.variables,
        "optimizer": {"optimizer": state.optimizer, "loss_mean": state.loss_mean, "skipped": state.skipped},
    }
    return items if state.average is None else {**items, "average": state.average}


def digest(meta: dict[str, Any]) -> str:
    """SHA-256 of everything in `meta` but the digest, as JSON."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@jax.jit
def is_finite(tree: Any) -> jax.Array:
    """Whether no float in any array is NaN or infinite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in floats]))


@jax.jit
def checksums(tree: Any) -> jax.Array:
    """One uint32 per array: the sum of its words, each weighted by its position, modulo 2^32.

    Integer sums do not depend on their order, so the result is the same on any mesh; any flipped bit changes it.
    """

    def one(x: jax.Array) -> jax.Array:
        bits, index = bits_and_index(x)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    leaves = jax.tree.leaves(tree)
    return jnp.stack([one(leaf) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.uint32)


def abstract(tree: Any) -> Any:
    """The shapes, dtypes and places of its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
