"""Bytes of the text that an evaluation measures: the denominator of bits per byte."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mythos_jax.data.batch import Batch
from mythos_jax.data.manifest import Manifest
from mythos_jax.data.tokenizer import Tokenizer


def measured_bytes(batches: Sequence[Batch], folder: Path, manifest: Manifest, tokenizer: Tokenizer | None) -> int:
    """UTF-8 bytes of the text of all targets in batches of held-out rows.

    An end of document has no bytes. The bytes of all rows of a split are those of its documents, which its manifest
    records; those of some rows are counted in the decoded text, and so are those of conversations, of which the targets
    that count are parts. tokenizer: by default the folder's own.
    """
    split = manifest.splits["held_out"]
    if manifest.chat is None and sum(int(batch["mask"].sum()) for batch in batches) == split.tokens:
        return split.text_bytes
    speller = tokenizer or manifest.load_tokenizer(folder)
    if manifest.chat is not None:
        return sum(
            speller.text_bytes(targets_T[weight_T != 0].tolist(), begins=False)
            for batch in batches
            for targets_T, weight_T in zip(batch["targets"], batch["mask"], strict=True)
        )
    return sum(
        row_bytes(speller, int(tokens_T[0]), targets_T[mask_T != 0], manifest.end_of_document)
        for batch in batches
        for tokens_T, targets_T, mask_T in zip(batch["tokens"], batch["targets"], batch["mask"], strict=True)
    )


def row_bytes(tokenizer: Tokenizer, before: int, targets_N: np.ndarray, end_of_document: int) -> int:
    """UTF-8 bytes of a row's targets, which may be the rest of a document, whole ones and the start of another.

    before: the token before the first target; a document begins after an end of document.
    """
    total, start, begins = 0, 0, before == end_of_document
    for stop in [*np.flatnonzero(targets_N == end_of_document).tolist(), len(targets_N)]:
        total += tokenizer.text_bytes(targets_N[start:stop].tolist(), begins)
        start, begins = stop + 1, True
    return total
