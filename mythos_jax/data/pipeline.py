"""From prepared rows to batches, in an order that is a pure function of (seed, step).

Grain shuffles the row numbers of each epoch; global batch s holds entries s B … s B + B - 1 of the endless sequence of
epochs. There is no other state: a run that starts at step s gets the batches that an uninterrupted run gets from there
on, and a process that needs some rows of each batch reads only those.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mythos_jax.data.batch import Batch, RowSelection, row_numbers
from mythos_jax.data.manifest import load_manifest
from mythos_jax.data.rows import TokenRows
from mythos_jax.errors import ConfigError

_THREADS, _PREFETCH = 2, 4
_REMOTE_THREADS, _REMOTE_PREFETCH = 4, 16

Folders = str | Path | Mapping[str, float] | Mapping[Path, float]


def train_batches(
    folders: Folders,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: RowSelection = None,
    document_mask: bool = False,
    threads: int | None = None,
    prefetch: int | None = None,
) -> Iterator[Batch]:
    """The endless batches of a run, from `start_step` on.

    folders: a prepared folder, or several and their weights. They take turns according to the weights, each shuffled
    and repeated in epochs of its own, and must have the same tokenizer and seq_len. If one of them holds conversations,
    all batches have the form of theirs.
    batch_size: of the global batch. rows: the rows of each batch that this process reads.
    document_mask: include segment_ids (see `TokenRows`).
    threads: readers; 0: read when a batch is requested. prefetch: batches read ahead. Both are larger for rows in an
    object store, which take tens of milliseconds each, by default.

    Raises ConfigError: no rows, a damaged file, a weight too small for `MixtureOrder`. StorageError: the storage stays
    away.
    """
    weights = dict(folders) if isinstance(folders, Mapping) else {folders: 1.0}
    weighted = any(load_manifest(folder).chat is not None for folder in weights)
    sources = [open_rows(folder, "train", document_mask, weighted) for folder in weights]
    for source in sources:
        if not len(source):
            raise ConfigError(f"{source.name} has no rows to train on")
    # A single folder is a mixture of one: SeedSequence hashes (seed, 0) as it does `seed`.
    orders = [row_order(len(source), [seed, part]) for part, source in enumerate(sources)]
    mixture = MixtureOrder(list(weights.values()))
    batches = _TrainBatches(sources, orders, mixture, batch_size, row_numbers(rows, batch_size))
    remote = any(source.remote for source in sources)
    threads = (_REMOTE_THREADS if remote else _THREADS) if threads is None else threads
    prefetch = (_REMOTE_PREFETCH if remote else _PREFETCH) if prefetch is None else prefetch
    return _until_closed(prefetched(batches, start_step, threads=threads, prefetch=prefetch), sources)


def _until_closed(batches: Iterator[Batch], sources: Sequence[TokenRows]) -> Iterator[Batch]:
    """The same batches. When nobody asks for more, what is read ahead does not go on waiting for storage."""
    try:
        yield from batches
    finally:
        for source in sources:
            source.close()


def eval_batches(
    folder: str | Path,
    split: str = "held_out",
    *,
    batch_size: int,
    max_rows: int = 0,
    rows: RowSelection = None,
    document_mask: bool = False,
    weighted: bool = False,
) -> Iterator[Batch]:
    """The first `max_rows` (0: all) rows of a split, once, in order.

    The last batch is filled up with rows of padding (mask 0), so that all batches have the same shape. `rows` and
    `document_mask` are as in `train_batches`, `weighted` as in `TokenRows`.

    Raises ConfigError: no rows, a damaged file.
    """
    source = open_rows(folder, split, document_mask, weighted)
    if not len(source):
        raise ConfigError(f"{source.name} has no rows to evaluate on")
    count = min(len(source), max_rows) if max_rows else len(source)
    local_rows = row_numbers(rows, batch_size)
    return (_read_padded(source, start + local_rows, count) for start in range(0, count, batch_size))


def open_rows(folder: str | Path, split: str, document_mask: bool = False, weighted: bool = False) -> TokenRows:
    """The rows of a split, "train" or "held_out", of a prepared folder.

    Raises ConfigError: not a prepared folder, or a damaged one.
    """
    return TokenRows(folder, split, document_mask, weighted)


def row_order(rows: int, seed: int | Sequence[int]) -> grain.MapDataset:
    """The endless training order: entry i is the number of the i-th row to read. Each epoch has each row once."""
    # Grain shuffles epoch k with seed + k, so its seeds 0 and 1 give the same order, one epoch apart. Hashing the seed
    # first makes the orders of neighbouring seeds independent, and allows any integer >= 0.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(rows).shuffle(seed=hashed).repeat()


class MixtureOrder:
    """The endless order in which the parts of a mixture take turns: `order[i]` is (part, entry of that part's order).

    The turns repeat with a period of at most `PERIOD`, within which each part has its fraction of the total weight,
    rounded to 1 / `PERIOD`, as evenly spread as possible. (Grain's own `mix` takes 0.4 ms per entry.)

    Raises ConfigError for a part that would get no turn.
    """

    PERIOD = 10_000

    def __init__(self, weights: Sequence[float]):
        exact = np.asarray(weights, float) / np.sum(weights) * self.PERIOD
        turns = np.floor(exact).astype(int)
        largest_remainders = np.argsort(turns - exact, kind="stable")
        turns[largest_remainders[: self.PERIOD - turns.sum()]] += 1
        if not turns.all():
            raise ConfigError(
                f"data.mixture: got weights {list(weights)}, allowed: each at least 1/{self.PERIOD} of their sum"
            )
        turns //= np.gcd.reduce(turns)
        self._turns = turns
        # Turn k of a part's n is due at (k + 1/2) / n of the period; sorting the due times interleaves the parts.
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in turns])
        by_time = np.argsort(due, kind="stable")
        self._part = np.repeat(np.arange(len(turns)), turns)[by_time]
        self._turn = np.concatenate([np.arange(n) for n in turns])[by_time]

    def __getitem__(self, index: int) -> tuple[int, int]:
        period, offset = divmod(index, len(self._part))
        part = int(self._part[offset])
        return part, period * int(self._turns[part]) + int(self._turn[offset])


def prefetched(batches: Any, start_step: int, *, threads: int = _THREADS, prefetch: int = _PREFETCH) -> Iterator[Batch]:
    """Iterates over `batches[start_step]`, `batches[start_step + 1]`, …, with `prefetch` of them made in advance by
    `threads` threads."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch) if threads else 0)
    return iter(grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options))


class _TrainBatches:
    """A Grain source of batches: element s is this process's rows of global batch s."""

    def __init__(
        self,
        sources: Sequence[TokenRows],
        orders: Sequence[grain.MapDataset],
        mixture: MixtureOrder,
        batch_size: int,
        rows: np.ndarray,
    ):
        self._sources, self._orders, self._mixture = sources, orders, mixture
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size  # as endless as Grain can count

    def __getitem__(self, step: int) -> Batch:
        start = int(step) * self._batch_size
        turns = [self._mixture[start + int(row)] for row in self._rows]
        batch: Batch = {}
        # The rows of each part are read together: one call of the reader is faster than many.
        for part, source in enumerate(self._sources):
            positions = [i for i, (turn_part, _) in enumerate(turns) if turn_part == part]
            part_rows = source.read([self._orders[part][turns[i][1]] for i in positions])
            for name, array in part_rows.items():
                if name not in batch:
                    batch[name] = np.empty((len(turns), *array.shape[1:]), array.dtype)
                batch[name][positions] = array
        return batch


def _read_padded(source: TokenRows, numbers: np.ndarray, count: int) -> Batch:
    """Rows by number; padding for numbers from `count` on."""
    is_real = numbers < count
    batch: Batch = {}
    for name, array in source.read(numbers[is_real]).items():
        fill = {"mask": 0, "segment_ids": 0}.get(name, source.manifest.end_of_document)
        batch[name] = np.full((len(numbers), source.manifest.seq_len), fill, array.dtype)
        batch[name][is_real] = array
    return batch
