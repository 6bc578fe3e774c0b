"""Saving and restoring, all of Orbax in one place.

A checkpoint holds three items: `model` (params and balance), `optimizer`, and `meta` (what the run was and the
checksums of the arrays, as JSON, with a digest of itself), so that evaluation reads the first alone. Orbax writes into
a temporary directory and renames it when it is whole: a half-written checkpoint is never seen.
"""

import hashlib
import json
import logging
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mythos_jax.errors import ConfigError, DamagedError, SaveError
from mythos_jax.paths import is_remote, to_path
from mythos_jax.processes import is_process_zero, log0, process_zero_first, raise_together
from mythos_jax.runs.state import TrainState, eval_variables

# Orbax reports each save and restore, and warns of its own defaults, through absl; failures it raises.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run directory, written in the background, the newest few kept."""

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False):
        self.directory = to_path(directory) if is_remote(directory) else Path(directory).absolute()
        if read_only and not self.directory.is_dir():
            raise ConfigError(
                f"{self.directory.parent}: has no checkpoints; allowed: the directory of a run that saved one"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def newest(self) -> int | None:
        """The last step that was saved whole, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts writing the state as of its step; raises SaveError if this save or the one before it failed."""
        step = int(state.step)
        if step in self.steps():
            return
        self._check_space(state)
        trees = _items(state)
        sums = {name: jax.device_get(checksums(tree)) for name, tree in trees.items()}
        meta = {**meta, "checksums": {name: [int(x) for x in values] for name, values in sums.items()}}
        meta["digest"] = _digest(meta)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))))

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises SaveError if it is not."""
        self._guard(self._manager.wait_until_finished)

    def restore_newest(
        self, like: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        """The newest state that is whole, with the shapes, dtypes and shardings of `like`, and its meta.

        check: is given the meta before any array is read, and raises ConfigError where the state is not for this run.
        A checkpoint that cannot be read, or that does not have the checksums it was saved with, is set aside as
        STEP.damaged with a warning, and the one before it is tried. Raises DamagedError when none is left.
        """
        for step in reversed(self.steps()):
            try:
                meta = raise_together(lambda step=step: self._meta(step))
                check(meta)
                return self._restore_state(step, like, meta["checksums"]), meta
            except ConfigError:  # of a whole checkpoint
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds
                why = " ".join(str(error).split())[:200]
                log0(f"warning: {self.directory / str(step)}: damaged, trying the one before ({why})")
                self._set_aside(step)
        raise DamagedError(f"{self.directory}: no checkpoint is whole; they were set aside as STEP.damaged")

    def restore_variables(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The variables to evaluate at `step`, placed as `like` is: with the weights' moving average if one was kept.

        Raises DamagedError where the files do not hold what was saved.
        """
        try:
            sums = self._meta(step)["checksums"]
            variables = self._restore_tree(step, "model", like, sums)
            if "average" in sums:
                variables = eval_variables(variables, self._restore_tree(step, "average", like["params"], sums))
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise DamagedError(f"{self.directory / str(step)}: damaged, cannot be restored ({why})") from error
        return variables

    def _meta(self, step: int) -> dict[str, Any]:
        """What was saved as `meta`, compared with its digest."""
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        # Checkpoints of earlier versions have none.
        if "digest" in meta and meta["digest"] != _digest(meta):
            raise DamagedError("meta is damaged, its digest is not that of the save")
        return meta

    def _restore_state(self, step: int, like: TrainState, sums: dict[str, list[int]]) -> TrainState:
        items = {name: self._restore_tree(step, name, tree, sums) for name, tree in _items(like).items()}
        at = jax.device_put(jnp.asarray(step, like.step.dtype), like.step.sharding)
        return like.replace(step=at, variables=items["model"], average=items.get("average"), **items["optimizer"])

    def _restore_tree(self, step: int, name: str, like: Any, sums: dict[str, list[int]]) -> Any:
        """One item, its checksums compared with those it was saved with."""
        tree = raise_together(lambda: self._restore(step, **{name: ocp.args.StandardRestore(_abstract(like))}))[name]
        if jax.device_get(checksums(tree)).tolist() != sums[name]:
            raise DamagedError(f"{name} is damaged, its checksums are not those of the save")
        return tree

    def _set_aside(self, step: int) -> None:
        self._manager.wait_until_finished()
        process_zero_first("checkpoint", lambda: is_process_zero() and self._rename(step))
        self._manager.reload()

    def _rename(self, step: int) -> None:
        (self.directory / str(step)).rename(self.directory / f"{step}.damaged")

    def close(self) -> None:
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _check_space(self, state: TrainState) -> None:
        """Refuses a save that cannot fit on a local disk, before it has written half of it."""
        if is_remote(self.directory):
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state)) // 2**20
        free = shutil.disk_usage(self.directory).free // 2**20
        if needed >= free:
            raise SaveError(
                f"{self.directory}: checkpoint could not be written: needs {needed} MiB, {free} MiB are free"
            )

    def _guard(self, write: Any) -> None:
        try:
            write()
        except Exception as error:
            # Orbax and TensorStore raise many kinds; the user needs one line with the place and the cause.
            cause = " ".join(str(error).split())[:300]
            raise SaveError(f"{self.directory}: checkpoint could not be written: {cause}") from error


def _items(state: TrainState) -> dict[str, Any]:
    """What is saved apart, by name: evaluation reads the model alone."""
    items = {
        "model": state.variables,
        "optimizer": {"optimizer": state.optimizer, "loss_mean": state.loss_mean, "skipped": state.skipped},
    }
    return items if state.average is None else {**items, "average": state.average}


def _digest(meta: dict[str, Any]) -> str:
    """Of all of `meta` but its digest, as JSON has it."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@jax.jit
def checksums(tree: Any) -> jax.Array:
    """One uint32 per array: the sum of its bits, each word weighted by its place, modulo 2^32.

    Integer sums do not depend on their order, so the result is the same on any mesh; a flipped bit changes it.
    """

    def one(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        place, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    leaves = jax.tree.leaves(tree)
    return jnp.stack([one(leaf) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.uint32)


def quiet_background_errors() -> None:
    """Keeps a failed background write to the one error that `Checkpoints` raises.

    Orbax raises it again in the thread that saves or waits; on the way it also logs it, and lets it die in threads
    and event loops of its own, each of which prints a traceback. Errors from elsewhere are shown as before.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    for owner, name in [(threading, "excepthook"), (sys, "unraisablehook")]:
        setattr(owner, name, _without_orbax(getattr(owner, name)))


def _without_orbax(shown: Callable[..., None]) -> Callable[..., None]:
    """An exception hook that leaves out what comes from Orbax, or from an event loop that it closed."""

    def hook(details: Any) -> None:
        from_orbax = any("orbax" in frame.filename for frame in traceback.extract_tb(details.exc_traceback))
        if not (from_orbax or "Event loop is closed" in str(details.exc_value)):
            shown(details)

    return hook


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
