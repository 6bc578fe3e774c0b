"""Prepared rows to batches, in an order that is a pure function of (seed, step).

Grain shuffles the row numbers of each epoch; global batch s is entries s B … s B + B - 1 of the endless sequence of
epochs. There is no other state: a run that starts at step s sees what an uninterrupted one sees from step s on, and
a process that wants some rows of each batch reads those and no others.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mythos_jax.data.manifest import SPLITS, load_manifest, rows_file
from mythos_jax.errors import ConfigError
from mythos_jax.typed import check_field

Batch = dict[str, np.ndarray]


class TokenRows:
    """The rows of one split, by number; threads may share it.

    `rows[i]` is {"tokens": int32 [T], "targets": int32 [T], "mask": bool [T]}: targets are the tokens that follow,
    the mask is False on the padding (end-of-document tokens) of the short last row.

    With `document_mask` also "segment_ids", int32 [T]: which of the row's documents, counted from 1, the target
    belongs to; 0 on the padding. As a target an end-of-document token ends its document, as an input it starts the
    next: a document in a row then sees what it sees alone, and what a prompt sees.
    """

    def __init__(self, folder: str | Path, split: str, document_mask: bool = False):
        check_field(split in SPLITS, "split", split, ", ".join(SPLITS))
        self.manifest = load_manifest(folder)
        self.file = rows_file(folder, split)
        self._document_mask = document_mask
        self._split = self.manifest.splits[split]
        self._dtype = np.dtype(self.manifest.dtype)
        # Rows are read at random, so reading ahead is waste.
        self._reader = ArrayRecordReader(str(self.file), "readahead_buffer_size:0,max_parallelism:0")
        # The reader raises nothing here: of a damaged file it says that it has 0 records, then reads them as b"".
        if self._reader.num_records() != self._split.rows:
            raise ConfigError(
                f"{self.file}: damaged, got {self._reader.num_records()} rows, the manifest says {self._split.rows}; "
                "prepare the folder again"
            )

    def __len__(self) -> int:
        return self._split.rows

    def __getitem__(self, index: int) -> Batch:
        return {name: array[0] for name, array in self.read([index]).items()}

    def read(self, indices: Sequence[int]) -> Batch:
        """Rows by number, stacked: tokens and targets int32 [n, T], mask bool [n, T], and any segment_ids int32 [n, T].

        Raises IndexError, and ConfigError where the file is damaged, naming file and row.
        """
        indices = [int(i) for i in indices]
        for i in indices:
            if not 0 <= i < len(self):
                raise IndexError(f"row {i} of {self.file}, which has {len(self)}")
        width = self.manifest.seq_len + 1
        stream = np.full((len(indices), width), self.manifest.end_of_document, np.int32)
        lengths = np.array([self._length(i) for i in indices], np.int32)
        for place, (i, record) in enumerate(zip(indices, self._records(indices), strict=True)):
            if len(record) != lengths[place] * self._dtype.itemsize:
                raise self._damaged(i, f"got {len(record)} bytes")
            stream[place, : lengths[place]] = np.frombuffer(record, self._dtype)
        mask = np.arange(width - 1) < lengths[:, None] - 1
        batch = {"tokens": stream[:, :-1], "targets": stream[:, 1:], "mask": mask}
        return batch | {"segment_ids": self._segments(batch)} if self._document_mask else batch

    def _segments(self, batch: Batch) -> np.ndarray:
        starts = batch["tokens"] == self.manifest.end_of_document
        starts[:, :1] = True
        return np.where(batch["mask"], np.cumsum(starts, axis=1, dtype=np.int32), np.int32(0))

    def _length(self, index: int) -> int:
        """Tokens in a row, one more than its targets."""
        return min(self.manifest.seq_len, self._split.tokens - index * self.manifest.seq_len) + 1

    def _records(self, indices: list[int]) -> list[bytes]:
        if not indices:  # to the reader, no numbers mean all of the file
            return []
        try:
            return self._reader.read(indices)
        except RuntimeError:
            for i in indices:  # which one was it?
                try:
                    self._reader.read([i])
                except RuntimeError as error:
                    raise self._damaged(i, str(error).split(";")[0]) from None
            raise

    def _damaged(self, index: int, why: str) -> ConfigError:
        return ConfigError(f"{self.file}, row {index}: damaged ({why}); prepare the folder again")


def open_rows(folder: str | Path, split: str, document_mask: bool = False) -> TokenRows:
    """The rows of a split, "train" or "held_out", of a prepared folder.

    Raises ConfigError: no prepared folder, or a damaged one.
    """
    return TokenRows(folder, split, document_mask)


def row_order(rows: int, seed: int | Sequence[int]) -> grain.MapDataset:
    """The endless order of training: entry g is the row read at place g, each row once in each epoch of `rows`."""
    # Grain shuffles epoch k by seed + k, so that its seeds 0 and 1 are the same order, one epoch apart. Mixed first,
    # neighbouring seeds have nothing in common, and any integer >= 0 will do.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(rows).shuffle(seed=mixed).repeat()


class MixtureOrder:
    """A pattern of at most `PERIOD` places, repeated: at place g stands entry `k` of part `p`, (p, k) = order[g].

    The parts' shares are their weights to one in `PERIOD`. (Grain's own `mix` takes 0.4 ms for each place.)
    Raises ConfigError for a part that would get no place.
    """

    PERIOD = 10_000

    def __init__(self, weights: Sequence[float]):
        shares = np.asarray(weights, float) / np.sum(weights) * self.PERIOD
        counts = np.floor(shares).astype(int)
        for part in np.argsort(counts - shares, kind="stable")[: self.PERIOD - counts.sum()]:
            counts[part] += 1  # the largest remainders
        if not counts.all():
            raise ConfigError(
                f"data.mixture: got weights {list(weights)}, allowed: at least 1/{self.PERIOD} of all each"
            )
        counts //= np.gcd.reduce(counts)
        self._counts = counts
        # The i-th of n turns of a part is due at (i + 1/2) / n of the period.
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        turn = np.argsort(due, kind="stable")
        self._part = np.repeat(np.arange(len(counts)), counts)[turn]
        self._entry = np.concatenate([np.arange(n) for n in counts])[turn]

    def __getitem__(self, place: int) -> tuple[int, int]:
        lap, place = divmod(place, len(self._part))
        part = int(self._part[place])
        return part, lap * int(self._counts[part]) + int(self._entry[place])


def mixture_batches(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: slice | Sequence[int] | np.ndarray | None = None,
    document_mask: bool = False,
    threads: int = 2,
    ahead: int = 4,
) -> Iterator[Batch]:
    """As `train_batches`, from several prepared folders in turns by their weights, each shuffled by epochs of its own.

    The folders have one tokenizer and one seq_len. Raises ConfigError: no rows, a damaged file, a tiny weight.
    """
    sources = [_train_rows(folder, document_mask) for folder in folders]
    orders = [row_order(len(source), [seed, part]) for part, source in enumerate(sources)]
    batches = _MixtureBatches(sources, orders, MixtureOrder(weights), batch_size, row_numbers(rows, batch_size))
    return prefetched(batches, start_step, threads=threads, ahead=ahead)


def train_batches(
    folder: str | Path,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: slice | Sequence[int] | np.ndarray | None = None,
    document_mask: bool = False,
    threads: int = 2,
    ahead: int = 4,
) -> Iterator[Batch]:
    """The endless batches of a run from `start_step` on, arrays [B, T] as in `TokenRows.read`.

    `batch_size`: B, of the global batch. `rows`: which of its rows to read, by slice or numbers (default: all), for
    a process whose devices hold just those. `document_mask`: with segment_ids, as in `TokenRows`. `threads` read
    `ahead` batches in advance; 0: read when asked.

    Raises ConfigError: no rows, a damaged file.
    """
    source = _train_rows(folder, document_mask)
    batches = _Batches(source, row_order(len(source), seed), batch_size, row_numbers(rows, batch_size))
    return prefetched(batches, start_step, threads=threads, ahead=ahead)


def prefetched(batches: Any, start_step: int, *, threads: int = 2, ahead: int = 4) -> Iterator[Batch]:
    """`batches[start_step]`, `batches[start_step + 1]`, …, made by `threads` threads, `ahead` of them in advance."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead) if threads else 0)
    return iter(grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options))


def row_numbers(rows: slice | Sequence[int] | np.ndarray | None, batch_size: int) -> np.ndarray:
    """The numbers of the rows of a batch that `rows` (None: all) names."""
    index = slice(None) if rows is None else rows if isinstance(rows, slice) else np.asarray(rows, int)
    return np.arange(batch_size)[index]


def _train_rows(folder: str | Path, document_mask: bool) -> TokenRows:
    source = open_rows(folder, "train", document_mask)
    if not len(source):
        raise ConfigError(f"{source.file}: has no rows to train on")
    return source


class _MixtureBatches:
    """Element s: this process's rows of global batch s, each part's read together."""

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
        return sys.maxsize // self._batch_size

    def __getitem__(self, step: int) -> Batch:
        places = [self._mixture[int(step) * self._batch_size + int(row)] for row in self._rows]
        batch: Batch = {}
        for part, source in enumerate(self._sources):
            mine = [i for i, (p, _) in enumerate(places) if p == part]
            read = source.read([self._orders[part][places[i][1]] for i in mine])
            for name, array in read.items():
                if name not in batch:
                    batch[name] = np.empty((len(places), *array.shape[1:]), array.dtype)
                batch[name][mine] = array
        return batch


class _Batches:
    """A Grain source of batches: element s is this process's rows of global batch s."""

    def __init__(self, source: TokenRows, order: grain.MapDataset, batch_size: int, rows: np.ndarray):
        self._source, self._order, self._batch_size, self._rows = source, order, batch_size, rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size  # endless, as far as Grain can count

    def __getitem__(self, step: int) -> Batch:
        start = int(step) * self._batch_size
        return self._source.read([self._order[start + int(row)] for row in self._rows])


def eval_batches(
    folder: str | Path,
    split: str = "held_out",
    *,
    batch_size: int,
    max_rows: int = 0,
    rows: slice | Sequence[int] | np.ndarray | None = None,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """The first `max_rows` (0: all) rows of a split, once, in order, arrays [B, T] as in `TokenRows.read`.

    The last batch is filled up with rows of padding, mask False, so that shapes never change. `rows`,
    `document_mask`: as in `train_batches`.

    Raises ConfigError: no rows, a damaged file.
    """
    source = open_rows(folder, split, document_mask)
    if not len(source):
        raise ConfigError(f"{source.file}: has no rows to evaluate on")
    count = min(len(source), max_rows) if max_rows else len(source)
    local = row_numbers(rows, batch_size)
    return (_padded(source, start + local, count) for start in range(0, count, batch_size))


def _padded(source: TokenRows, indices: np.ndarray, count: int) -> Batch:
    real = indices < count
    read = source.read(indices[real])
    batch = {}
    for name, array in read.items():
        fill = {"mask": False, "segment_ids": 0}.get(name, source.manifest.end_of_document)
        batch[name] = np.full((len(indices), source.manifest.seq_len), fill, array.dtype)
        batch[name][real] = array
    return batch
