"""What a run trains on, whatever it is made of: prepared text, a mixture, or a task that makes its own."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mythos_jax.config import Config
from mythos_jax.data.fetch import local_folder
from mythos_jax.data.prepare import ensure_prepared
from mythos_jax.data.tasks import TaskData
from mythos_jax.errors import ConfigError

Batch = dict[str, np.ndarray]


class Data(Protocol):
    """Batches of tokens, targets int32 [B, T] and mask bool [B, T], in an order that is a function of (seed, step);
    with `data.document_mask` also segment_ids int32 [B, T] (see `TokenRows`).

    identity: text or plain containers that name the data; a run that was made with others is not resumed.
    """

    identity: Any

    def train_batches(
        self, *, batch_size: int, seed: int, start_step: int = 0, rows: slice | Sequence[int] | np.ndarray | None = None
    ) -> Iterator[Batch]:
        """The endless batches of a run from `start_step` on; `rows`: the rows of each that this process needs."""
        ...

    def held_out_batches(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """Batches to measure the loss on, all of one shape; `max_rows` bounds them (0: all)."""
        ...


class TextData:
    """Rows of text, prepared first when they are missing."""

    def __init__(self, config: Config, progress: bool = True, prepare: bool = True):
        self.folder, self.document_mask = local_folder(config.data_path), config.data.document_mask
        manifest = ensure_prepared(config, progress=progress, path=self.folder, prepare_missing=prepare)
        rows = manifest.fingerprint
        self.identity = {"rows": rows, "document_mask": True} if self.document_mask else rows

    def train_batches(self, **keywords: Any) -> Iterator[Batch]:
        from mythos_jax.data.pipeline import train_batches

        return train_batches(self.folder, document_mask=self.document_mask, **keywords)

    def held_out_batches(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        from mythos_jax.data.pipeline import eval_batches

        return eval_batches(self.folder, batch_size=batch_size, max_rows=max_rows, document_mask=self.document_mask)


class MixtureData:
    """Rows of several prepared folders in turns, by their weights."""

    def __init__(self, config: Config):
        self.weights = {local_folder(folder): weight for folder, weight in config.data.mixture.items()}
        self.document_mask = config.data.document_mask
        self.parts = {folder: ensure_prepared(config, path=folder) for folder in self.weights}
        # In their order, which is that of the rows; where a folder lies does not matter.
        parts = [[self.parts[folder].fingerprint, weight] for folder, weight in self.weights.items()]
        self.identity = {"mixture": parts} | ({"document_mask": True} if self.document_mask else {})

    def train_batches(self, **keywords: Any) -> Iterator[Batch]:
        from mythos_jax.data.pipeline import mixture_batches

        return mixture_batches(
            list(self.weights), list(self.weights.values()), document_mask=self.document_mask, **keywords
        )

    def held_out_batches(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """Of all parts that have rows held out; `max_rows` counts per part."""
        from mythos_jax.data.pipeline import eval_batches

        kept = [folder for folder, manifest in self.parts.items() if manifest.splits["held_out"].rows]
        if not kept:
            raise ConfigError(f"{', '.join(map(str, self.parts))}: no rows are held out to evaluate on")
        for folder in kept:
            yield from eval_batches(folder, batch_size=batch_size, max_rows=max_rows, document_mask=self.document_mask)


def open_data(config: Config, progress: bool = True, prepare: bool = True) -> Data:
    """The data of a config; `prepare`: make it where it is missing, rather than refuse.

    Raises ConfigError where it cannot be used, as `ensure_prepared` and `TaskData` do.
    """
    if config.data.task.name:
        return TaskData(config)
    if config.data.mixture:
        return MixtureData(config)
    return TextData(config, progress, prepare)
