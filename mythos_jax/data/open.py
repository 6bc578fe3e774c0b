"""Opens the data of a config, whatever it consists of: prepared text, a mixture, or a task that generates its own."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mythos_jax.config import Config, DataConfig
from mythos_jax.data.batch import Batch, RowSelection
from mythos_jax.data.conventions import save_conventions, stored_conventions
from mythos_jax.data.ensure import ensure_prepared
from mythos_jax.data.fetch import local_folder
from mythos_jax.data.manifest import Manifest
from mythos_jax.data.tasks import TaskData
from mythos_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError


class Data(Protocol):
    """What a run trains on: batches (see batch.py) in an order that is a pure function of (seed, step).

    identity: text or plain containers that identify the data. A run made with other data is not resumed.
    """

    identity: Any

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What its text was tokenized with; None if its tokens are not text."""
        ...

    def save_text(self, directory: str | Path) -> None:
        """Writes what belongs to the text that a run learns into its directory: the tokenizer, and how conversations
        are written, if it has any."""
        ...

    def train_batches(
        self, *, batch_size: int, seed: int, start_step: int = 0, rows: RowSelection = None
    ) -> Iterator[Batch]:
        """The endless batches of a run, from `start_step` on. rows: those of each batch that this process needs."""
        ...

    def held_out_batches(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """Batches to measure the loss on, all of one shape. max_rows: how many rows at most; 0: all."""
        ...


class PreparedData:
    """Rows of one prepared folder, or of several in turn according to their weights."""

    def __init__(
        self, weights: dict[Path, float], manifests: dict[Path, Manifest], data: DataConfig, identity: Any
    ) -> None:
        self.weights, self.manifests = weights, manifests
        self.document_mask, self._end_of_document = data.document_mask, data.end_of_document
        self.identity = identity

    @property
    def _weighted(self) -> bool:
        """Whether batches have the form of those of conversations."""
        return any(manifest.chat is not None for manifest in self.manifests.values())

    def save_text(self, directory: str | Path) -> None:
        self.tokenizer.save(directory)
        for folder, manifest in self.manifests.items():
            if manifest.chat is not None:
                found = stored_conventions(folder, self.tokenizer, manifest.vocab_size)
                if found is not None:
                    save_conventions(directory, self.tokenizer, found)
                return

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the first folder, which all share. Raises ConfigError if it is not what its manifest says."""
        folder, manifest = next(iter(self.manifests.items()))
        file = folder / TOKENIZER_FILE
        tokenizer = ByteTokenizer() if manifest.in_bytes else load_tokenizer(file, self._end_of_document)
        if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise ConfigError(f"{file}: is not what the rows were prepared with; prepare them again")
        tokenizer.name = manifest.tokenizer
        return tokenizer

    def train_batches(
        self, *, batch_size: int, seed: int, start_step: int = 0, rows: RowSelection = None
    ) -> Iterator[Batch]:
        from mythos_jax.data.pipeline import train_batches  # here, because importing Grain takes long

        return train_batches(
            self.weights,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            rows=rows,
            document_mask=self.document_mask,
        )

    def held_out_batches(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """The held-out rows of all folders that have any. `max_rows` applies to each folder."""
        from mythos_jax.data.pipeline import eval_batches

        folders = [folder for folder, manifest in self.manifests.items() if manifest.splits["held_out"].rows]
        if not folders:
            raise ConfigError(f"{', '.join(map(str, self.manifests))}: no rows are held out to evaluate on")
        return (
            batch
            for folder in folders
            for batch in eval_batches(
                folder,
                batch_size=batch_size,
                max_rows=max_rows,
                document_mask=self.document_mask,
                weighted=self._weighted,
            )
        )


def open_data(config: Config, progress: bool = True, prepare: bool = True, resumes: bool = False) -> Data:
    """The data of a config. prepare: make prepared text if it is missing, instead of refusing. resumes: for a run that
    has begun, and goes on with its rows if the text has changed since they were prepared.

    Raises ConfigError: the data cannot be used, as described at `ensure_prepared` and `TaskData`.
    """
    if config.data.task.name:
        return TaskData(config)
    if config.data.mixture:
        return _open_mixture(config)
    return _open_text(config, progress, prepare, resumes)


# The identities below are stored in checkpoints: a change of their form would prevent existing runs from resuming.


def _open_text(config: Config, progress: bool, prepare: bool, resumes: bool) -> PreparedData:
    folder, document_mask = local_folder(config.data_path, config.data.copy), config.data.document_mask
    manifest = ensure_prepared(config, progress=progress, path=folder, prepare_missing=prepare, resumes=resumes)
    rows = manifest.fingerprint
    identity = {"rows": rows, "document_mask": True} if document_mask else rows
    return PreparedData({folder: 1.0}, {folder: manifest}, config.data, identity)


def _open_mixture(config: Config) -> PreparedData:
    document_mask = config.data.document_mask
    weights = {local_folder(folder, config.data.copy): weight for folder, weight in config.data.mixture.items()}
    manifests = {folder: ensure_prepared(config, path=folder) for folder in weights}
    # The order of the folders matters, because it determines the order of the rows; their paths do not.
    parts = [[manifests[folder].fingerprint, weight] for folder, weight in weights.items()]
    identity = {"mixture": parts} | ({"document_mask": True} if document_mask else {})
    return PreparedData(weights, manifests, config.data, identity)
