"""Checkpoints on each host's own disk or in its memory, saved more often than those of the run directory.

Each process writes the parts of the state that its devices hold into FOLDER/mythos-RUN/TOKEN/PROCESS/STEP, and waits
for no other one meanwhile. When the run starts again, it goes on from the newest step of which the processes together
have every part: a process that misses its own, because it is on another host now, gets a copy from one that has the
same (`peers.py`). The token is in a file of the run directory. It is replaced when a run goes on from anything else, so
that what was saved locally before is not taken for its future. Process 0 alone touches that file: another host may not
see yet what has just been written there.
"""

import contextlib
import hashlib
import json
import logging
import math
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.json_text import parse_json
from mythos_jax.paths import expand, write_whole
from mythos_jax.processes import gathered, log0, of_process_zero, raise_together
from mythos_jax.runs.checkpoints import abstract, check_sums, checked_meta, items_of, with_checksums, with_items
from mythos_jax.runs.orbax_threads import in_daemon_thread, quiet_orbax
from mythos_jax.runs.peers import copy_folders
from mythos_jax.runs.state import TrainState
from mythos_jax.streams import counted

TOKEN_FILE = "local_checkpoints.token"
_ID = "id-"

Restored = tuple[TrainState, dict[str, Any]]
Holdings = dict[str, dict[int, Path]]  # by the key of their parts and by step: the checkpoints that this process sees


@dataclass(frozen=True)
class Table:
    """What a process tells the others. needs: the key of the parts that its devices hold. has: steps by key."""

    host: str
    needs: str
    has: Mapping[str, Sequence[int]]


class LocalCheckpoints:
    """The local checkpoints of one run, as this process sees them. All processes call its methods at once."""

    def __init__(self, folder: str, run_dir: Any) -> None:
        """folder: may contain ~ and $VARIABLES, and so differ between hosts. Raises ConfigError if it cannot be
        written."""
        path = str(run_dir.absolute() if isinstance(run_dir, Path) else run_dir)
        name = f"mythos-{hashlib.sha256(path.encode()).hexdigest()[:12]}"
        self._root = raise_together(lambda: _made(Path(expand(folder)).absolute() / name))
        self._token_file = run_dir / TOKEN_FILE
        self._token = of_process_zero(self._read_token)
        ids = gathered(min(path.name for path in self._root.glob(f"{_ID}*")))
        self._here = [i for i, found in enumerate(ids) if found == ids[jax.process_index()]]  # who share the folder
        self.restored: int | None = None  # the step that the run goes on from, if `restore` found it
        self._source = self._root  # what this process has restored
        self._failure, self._stopped = "", False
        self._checkpointer = _checkpointer()

    def restore(
        self,
        like: TrainState,
        check: Callable[[dict[str, Any]], None],
        stored: int | None,
        end: float = math.inf,
    ) -> Restored | None:
        """The newest state that the processes have together, and its meta; None if there is none, or it is older than
        `stored`, the newest checkpoint of the run directory, or no future of that. Says so if a newer one is not
        restored.

        check: as for `Checkpoints.restore_newest`. end: the last step of the run. A state of that step or a later one
        is not restored, because a run that has nothing left to do saves no checkpoint.
        """
        have = raise_together(self._holdings)
        mine = Table(socket.gethostname(), parts_key(like), {key: sorted(steps) for key, steps in have.items()})
        tables = [Table(**json.loads(text)) for text in gathered(json.dumps(asdict(mine)))]
        steps = [s for s in sorted(_steps(tables), reverse=True) if s >= (stored or 0)]
        if steps and steps[0] >= end:
            log0(f"local checkpoints: step {steps[0]} is not restored, because training.steps is {end}")
            steps = [s for s in steps if s < end]
        if not steps:
            return None
        newest = steps[0]
        step = next((s for s in steps if None not in sources(s, tables)), None)
        if step is None:
            lacks = sources(newest, tables).index(None)
            log0(
                f"local checkpoints: step {newest} is not restored, because no process has what process {lacks} on "
                f"{tables[lacks].host} needs; a host or the mesh has changed"
            )
            return None
        try:
            return self._restore(step, tables, have, like, check, stored)
        except ConfigError:  # from `check`
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            log0(f"warning: local checkpoints: step {step} is not restored ({one_line(error, 200)})", logging.WARNING)
            return None

    def begin(self, like: TrainState) -> None:
        """Before the first step: deletes what is not to be restored any more. Raises ConfigError if two checkpoints do
        not fit."""
        if self.restored is None:
            self._token = of_process_zero(self._new_token)
        raise_together(self._take_over)
        raise_together(self._delete_rest)
        self._check_space(like)

    def save(self, state: TrainState, meta: dict[str, Any], stored: Sequence[int]) -> bool:
        """Starts writing the state. Writes nothing and returns False if any of it is NaN or infinite.

        stored: the checkpoints that the run directory has, those that are being written included.
        A save that fails is the last one, and is said: the run goes on with the checkpoints of its directory.
        """
        if self._stopped:
            return True
        self._finish()
        if problems := [text for text in gathered(self._failure) if text]:
            self._stopped = True
            log0(f"warning: local checkpoints: {problems[0]}; no more of them are saved", logging.WARNING)
            return True
        # Every process has written the save before this one, so that nothing older is needed.
        for path in list(self._own().values())[:-1]:
            shutil.rmtree(path, ignore_errors=True)
        meta = {**meta, "parts": parts_key(state), "stored": list(stored)}
        if (whole := with_checksums(state, meta)) is None:
            return False
        trees, meta = whole
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(trees), meta=ocp.args.JsonSave(meta))
        self._try(lambda: self._checkpointer.save(self._folder / str(int(state.step)), args=items))
        return True

    def finish(self) -> None:
        """Deletes them: the run directory has what the run ends with."""
        self._finish()
        shutil.rmtree(self._root, ignore_errors=True)

    def close(self) -> None:
        self._try(self._checkpointer.close)

    @property
    def _folder(self) -> Path:
        return self._root / self._token / str(jax.process_index())

    def _read_token(self) -> str:
        found: str = self._token_file.read_text(encoding="utf-8") if self._token_file.exists() else "none"
        return found

    def _new_token(self) -> str:
        token = secrets.token_hex(8)
        write_whole(self._token_file, token.encode())
        return token

    def _take_over(self) -> None:
        """Moves what was restored to this process's folder if it is in that of one that is not on this host any
        more."""
        if self.restored is None or self._source.parent.name in map(str, self._here):
            return
        own = self._folder / str(self.restored)
        shutil.rmtree(own, ignore_errors=True)
        own.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process on this host has restored and moved the same
            self._source.rename(own)

    def _delete_rest(self) -> None:
        """Keeps what was restored, on the host of the process that has it."""
        here = set(map(str, self._here))
        others = [path for path in (self._root / self._token).glob("*") if path.name not in here]
        before = [path for path in self._root.glob("*") if path.name != self._token and path.is_dir()]
        for path in [*before, *others, *self._folder.glob("*")]:
            if path != self._folder / str(self.restored):
                shutil.rmtree(path, ignore_errors=True)

    def _own(self) -> dict[int, Path]:
        """The checkpoints that this process has written, in order."""
        return dict(sorted(_whole(self._folder).items()))

    def _holdings(self) -> Holdings:
        """Those of all processes whose folders this one sees, with the metas that can be read."""
        found: Holdings = {}
        folder = self._root / self._token
        for of_process in sorted(folder.iterdir()) if folder.is_dir() else []:
            for step, path in _whole(of_process).items():
                try:
                    key = parse_json((path / "meta" / "metadata").read_bytes())["parts"]
                except (OSError, ValueError, KeyError, TypeError):
                    continue
                found.setdefault(key, {})[step] = path
        return found

    def _restore(
        self,
        step: int,
        tables: Sequence[Table],
        have: Holdings,
        like: TrainState,
        check: Callable[[dict[str, Any]], None],
        stored: int | None,
    ) -> Restored:
        source, me = sources(step, tables), jax.process_index()
        pairs = [(sender, receiver) for receiver, sender in enumerate(source) if sender not in (None, receiver)]
        folder = self._folder / str(step)
        incoming = folder.with_name(f"copy-{step}")
        if source[me] == me:
            folder = have[tables[me].needs][step]
        # All processes know what they have, and nothing is received yet. Room is made for it.
        for path in (self._root / self._token).glob("*/*"):
            if path.name != str(step):
                shutil.rmtree(path, ignore_errors=True)
        if pairs:
            log0(f"local checkpoints: {counted(len(pairs), 'process', 'processes')} get step {step} from another one")
            copy_folders(pairs, lambda receiver: have[tables[receiver].needs][step], incoming)

        def read_meta() -> dict[str, Any]:
            if source[me] != me:
                shutil.rmtree(folder, ignore_errors=True)
                incoming.rename(folder)
            meta = checked_meta(self._read(folder, meta=ocp.args.JsonRestore())["meta"])
            if stored not in (None, *meta["stored"]):
                raise ValueError(f"the run directory has step {stored}, which was not there before it")
            return meta

        meta = raise_together(read_meta)
        check(meta)
        items = abstract(items_of(like))
        places = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), items)
        arguments = ocp.args.PyTreeRestore(item=items, restore_args=places)
        trees = raise_together(partial(self._read, folder, state=arguments))["state"]
        for name, tree in trees.items():
            check_sums(name, tree, meta["checksums"])
        self.restored, self._source = step, folder
        return with_items(like, step, trees), meta

    def _read(self, folder: Path, **items: Any) -> Any:
        with quiet_orbax():
            return self._checkpointer.restore(folder, args=ocp.args.Composite(**items))

    def _check_space(self, like: TrainState) -> None:
        """Two checkpoints of each process that shares the folder must fit: one that is whole, and the next one while
        it is written."""
        needs = gathered(str(2 * sum(_bytes_here(x) for x in jax.tree.leaves(items_of(like)))))
        needed = sum(int(needs[i]) for i in self._here)

        def check() -> None:
            count = counted(len(self._here), "process", "processes")
            used = sum(file.stat().st_size for file in self._root.rglob("*") if file.is_file())
            free = shutil.disk_usage(self._root).free
            if needed > free + used:
                raise ConfigError(
                    f"training.local_checkpoints.folder: got {self._root.parent}, where {free / 2**30:.2f} GiB are "
                    f"free; allowed: a place for two checkpoints of {count}, {needed / 2**30:.2f} GiB"
                )

        raise_together(check)

    def _finish(self) -> None:
        self._try(self._checkpointer.wait_until_finished)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            with quiet_orbax():
                in_daemon_thread(work)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            where = f"process {jax.process_index()} on {socket.gethostname()} could not write {self._folder}"
            self._failure = self._failure or f"{where}: {one_line(error, 200)}"


def parts_key(state: TrainState) -> str:
    """A short text that is equal for two processes if their devices hold the same parts of the same arrays."""
    leaves, structure = jax.tree.flatten(items_of(state))
    parts = [(x.shape, str(x.dtype), sorted(_parts_here(x))) for x in leaves]
    return hashlib.sha256(f"{structure} {parts}".encode()).hexdigest()[:16]


def sources(step: int, tables: Sequence[Table]) -> list[int | None]:
    """For each process the one whose copy of its parts it restores: itself if it has one; None if no process has."""
    return [
        next((j for j in (i, *range(len(tables))) if step in tables[j].has.get(table.needs, ())), None)
        for i, table in enumerate(tables)
    ]


def _steps(tables: Sequence[Table]) -> set[int]:
    return {step for table in tables for steps in table.has.values() for step in steps}


def _parts_here(x: Any) -> set[tuple[tuple[int, int], ...]]:
    """Where in the array the parts are that this process's devices hold: (begin, end) along each axis."""
    indices = x.sharding.addressable_devices_indices_map(x.shape).values()
    return {tuple(s.indices(n)[:2] for s, n in zip(index, x.shape, strict=True)) for index in indices}


def _bytes_here(x: Any) -> int:
    sizes = [math.prod(end - begin for begin, end in part) for part in _parts_here(x)]
    return sum(sizes) * int(x.dtype.itemsize)


def _whole(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder, by step."""
    found = folder.iterdir() if folder.is_dir() else []
    return {int(path.name): path for path in found if path.name.isdecimal() and ocp.utils.is_checkpoint_finalized(path)}


def _made(root: Path) -> Path:
    """Makes the folder, with a file whose name tells which processes share it: they may have several host names."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not any(root.glob(f"{_ID}*")):
            (root / f"{_ID}{secrets.token_hex(8)}").touch()
    except OSError as error:
        raise ConfigError(
            f"training.local_checkpoints.folder: {root.parent} cannot be written ({error.strerror}); allowed: a folder "
            "on each host's own disk or in its memory, such as /dev/shm"
        ) from None
    return root


def _checkpointer() -> Any:
    """Writes what this process holds, whether another process holds it, too, and waits for none."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None,
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"local_{jax.process_index()}",
    )
    arrays = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, type_handler_registry=registry)
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    # Otherwise Orbax makes folders in the background, and processes signal that to each other.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    both = ocp.CompositeCheckpointHandler(
        state=state,
        meta=meta,
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone, async_options=options),
    )
    return ocp.AsyncCheckpointer(both, async_options=options, multiprocessing_options=alone)
