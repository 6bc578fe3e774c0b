"""What a checkpoint remembers of the data that it was trained on: its rows and its tokenizer.

Weights are of no use with another tokenizer than their own, and nothing in their shapes shows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mythos_jax.data.manifest import Manifest
from mythos_jax.data.tokenizer import ByteTokenizer, Tokenizer
from mythos_jax.errors import ConfigError, DamagedError, one_line
from mythos_jax.processes import log0


def tokenizer_record(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """What a checkpoint stores about the tokenizer of its data; None for data that is not text."""
    if tokenizer is None:
        return None
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "end_of_document": tokenizer.end_of_document,
    }


@dataclass(frozen=True)
class TrainedOn:
    """The data of a checkpoint.

    rows: fingerprints of its prepared folders; none for a reasoning task.
    tokenizer: see `tokenizer_record`; None for a task with tokens of its own, and in checkpoints of 0.1.0, which did
    not store it.
    """

    rows: tuple[str, ...] = ()
    tokenizer: Mapping[str, Any] | None = None

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any]) -> Self:
        """From the metadata of a checkpoint of any version; see `Data.identity` for the forms of its `data`.

        Raises DamagedError: those of 0.1.0 have no digest that would show other damage.
        """
        try:
            return cls._from_metadata(meta)
        except (TypeError, ValueError, KeyError) as error:
            raise DamagedError(f"meta is damaged: its data are not those of a run ({one_line(error)})") from None

    @classmethod
    def _from_metadata(cls, meta: Mapping[str, Any]) -> Self:
        data = meta.get("data")
        if isinstance(data, str):
            rows: tuple[str, ...] = (data,)
        elif isinstance(data, Mapping) and "mixture" in data:
            rows = tuple(fingerprint for fingerprint, _ in data["mixture"])
        else:
            rows = (data["rows"],) if isinstance(data, Mapping) and "rows" in data else ()
        tokenizer = meta.get("tokenizer")
        return cls(rows, tokenizer and {name: tokenizer[name] for name in ("name", "fingerprint", "end_of_document")})

    @property
    def in_bytes(self) -> bool:
        return self.tokenizer is not None and self.tokenizer["fingerprint"] == ByteTokenizer.fingerprint

    def check_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        """Raises ConfigError if this is not the tokenizer that the checkpoint was trained with, as far as is known."""
        if self.tokenizer is None:
            return
        if tokenizer.fingerprint != self.tokenizer["fingerprint"]:
            raise ConfigError(
                f"{name}: is not the tokenizer that the model was trained with, {self.tokenizer['name']} with "
                f"fingerprint {self.tokenizer['fingerprint'][:12]}; got fingerprint {tokenizer.fingerprint[:12]}"
            )
        if tokenizer.end_of_document != self.tokenizer["end_of_document"]:
            raise ConfigError(
                f"{name}: got end-of-document token {tokenizer.end_of_document}, the model was trained with "
                f"{self.tokenizer['end_of_document']}"
            )

    def check_rows(self, manifest: Manifest, folder: object, seq_len: int | None) -> None:
        """Raises ConfigError if rows were prepared with another tokenizer, as far as is known.

        seq_len: of the run, for its own folders; rows that were prepared there since must still fit the run.
        """
        if manifest.fingerprint in self.rows:
            return
        known = self.tokenizer
        if known is not None and manifest.tokenizer_fingerprint != known["fingerprint"]:
            raise ConfigError(
                f"{folder}: prepared with a different tokenizer from the model's: {manifest.tokenizer}, the model was "
                f"trained with {known['name']}"
            )
        if known is not None and manifest.end_of_document != known["end_of_document"]:
            raise ConfigError(
                f"{folder}: prepared with end-of-document token {manifest.end_of_document}, allowed: the model's, "
                f"{known['end_of_document']}"
            )
        if seq_len is None:
            return
        if known is None:
            raise ConfigError(
                f"{folder}: prepared anew since the run was trained, which did not keep its tokenizer; allowed: --data "
                f"{folder}, if it is still the same tokenizer"
            )
        if manifest.seq_len != seq_len:
            raise ConfigError(f"{folder}: prepared anew with seq_len {manifest.seq_len}, allowed: the run's, {seq_len}")
        log0(f"{folder}: prepared anew since the run was trained; these are other rows")
