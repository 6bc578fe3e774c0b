"""Copies folders between the hosts of a run through its devices: the connections between them are there already, and
are the fastest."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mythos_jax.processes import gathered, raise_together

CHUNK = 2**26  # bytes that a process sends at a time

Files = list[tuple[str, int]]  # path in the folder, bytes
Result = TypeVar("Result")


def copy_folders(pairs: Sequence[tuple[int, int]], sent: Callable[[int], Path], received: Path) -> None:
    """Copies folders from process to process; all processes call it at once.

    pairs: (sender, receiver); nobody receives twice. sent: the folder that this process sends to a receiver. received:
    where this process puts what it receives.
    """
    me, left, failures = jax.process_index(), list(pairs), list[Exception]()
    mesh = Mesh(np.array([_first_device(process) for process in range(jax.process_count())]), ("process",))
    while left:
        turn = {sender: receiver for sender, receiver in reversed(left)}  # each sends to one at a time
        left = [pair for pair in left if pair not in turn.items()]
        source = sent(turn[me]) if me in turn else None
        files = _attempt(partial(_files, source), failures) if source is not None else None
        tables: list[Files] = [json.loads(text) for text in gathered(json.dumps(files or []))]
        senders = {receiver: sender for sender, receiver in turn.items()}
        move = _mover(mesh, tuple(turn.items()))
        for chunk in range(max(map(_size, tables)) // CHUNK + 1):
            buffer = np.zeros(CHUNK, np.uint8)
            if source is not None:
                _attempt(partial(_read, source, tables[me], chunk * CHUNK, buffer), failures)
            got = move(buffer)
            if me in senders:
                _attempt(partial(_write, received, tables[senders[me]], chunk * CHUNK, got), failures)
    raise_together(lambda: _raise(failures))


def _attempt(work: Callable[[], Result], failures: list[Exception]) -> Result | None:
    """Keeps an error for the end, because the others go on."""
    try:
        return work()
    except Exception as error:
        failures.append(error)
        return None


def _raise(failures: list[Exception]) -> None:
    for failure in failures:
        raise failure


def _first_device(process: int) -> jax.Device:
    return min((d for d in jax.devices() if d.process_index == process), key=lambda d: d.id)


def _mover(mesh: Mesh, pairs: tuple[tuple[int, int], ...]) -> Callable[[np.ndarray], np.ndarray]:
    """A function that all processes call at once with bytes, and that returns those of a process's sender."""
    by_process = PartitionSpec("process")
    sharding = NamedSharding(mesh, by_process)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=by_process, out_specs=by_process)
    def permuted(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, "process", pairs)

    def move(buffer: np.ndarray) -> np.ndarray:
        mine = jax.device_put(buffer, _first_device(jax.process_index()))
        whole = jax.make_array_from_single_device_arrays((mesh.size * len(buffer),), sharding, [mine])
        return np.asarray(permuted(whole).addressable_shards[0].data)

    return move


def _files(folder: Path) -> Files:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [(name, (folder / name).stat().st_size) for name in names]


def _size(files: Files) -> int:
    return sum(size for _, size in files)


def _read(folder: Path, files: Files, begin: int, buffer: np.ndarray) -> None:
    """Fills the buffer with the bytes from `begin` on of all files, one after the other."""
    for name, at, skip, count in _parts(files, begin, len(buffer)):
        with (folder / name).open("rb") as file:
            file.seek(skip)
            buffer[at : at + count] = np.frombuffer(file.read(count), np.uint8)


def _write(folder: Path, files: Files, begin: int, buffer: np.ndarray) -> None:
    for name, at, skip, count in _parts(files, begin, len(buffer)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.seek(skip)
            file.write(buffer[at : at + count].tobytes())


def _parts(files: Files, begin: int, length: int) -> list[tuple[str, int, int, int]]:
    """The files that `length` bytes from `begin` on are in: name, offset in the buffer, offset in the file, count.
    Empty files are among them where they lie."""
    parts, start = [], 0
    for name, size in files:
        first, last = max(start, begin), min(start + size, begin + length)
        if first < last or (size == 0 and begin <= start < begin + length):
            parts.append((name, first - begin, first - start, last - first))
        start += size
    return parts
