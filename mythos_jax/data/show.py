"""One row of a prepared folder, as a reader sees it: its text, what is trained on, and which tokens see each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mythos_jax.data.fetch import local_folder
from mythos_jax.data.manifest import SPLITS
from mythos_jax.data.rows import TokenRows
from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.typed import check_field


@dataclass(frozen=True)
class ShownRow:
    """ids: int [n] of the row without its padding. weights: of each as a target, which the first one is not. segments:
    the conversation or document of each, counted from 1 in the row. padding: targets that the row has besides."""

    folder: str
    split: str
    number: int
    rows: int
    chat: bool
    ids: list[int]
    weights: list[float]
    segments: list[int]
    padding: int
    tokenizer: Tokenizer

    @property
    def trained(self) -> int:
        return sum(weight > 0 for weight in self.weights)

    def runs(self) -> Iterator[tuple[int, float, str]]:
        """The segment, weight and text of each run of tokens that share both."""
        edges = [i for i in range(1, len(self.ids)) if self._key(i) != self._key(i - 1)]
        begin = 0  # of the segment
        for start, end in zip([0, *edges], [*edges, len(self.ids)], strict=True):
            if self.segments[start] != self.segments[begin]:
                begin = start
            # With what is before it in its segment: decoders treat the first token of a text differently.
            before, upto = (self.tokenizer.spell(self.ids[begin:stop]) for stop in (start, end))
            text = upto.removeprefix(before) if upto.startswith(before) else self.tokenizer.spell(self.ids[start:end])
            yield self.segments[start], self.weights[start], text

    def tokens(self) -> Iterator[tuple[int, str, float, int]]:
        """The id, text, weight and segment of each token."""
        for i, number in enumerate(self.ids):
            yield number, self.tokenizer.spell([number]), self.weights[i], self.segments[i]

    def to_json(self) -> dict[str, Any]:
        names = ("id", "text", "weight", "segment")
        return {
            "folder": self.folder,
            "split": self.split,
            "row": self.number,
            "rows": self.rows,
            "chat": self.chat,
            "trained": self.trained,
            "padding": self.padding,
            "tokens": [dict(zip(names, token, strict=True)) for token in self.tokens()],
        }

    def _key(self, i: int) -> tuple[int, float]:
        return self.segments[i], self.weights[i]


def show_row(folder: str, split: str, number: int) -> ShownRow:
    """Row `number`, from 0 on, of a split of a prepared folder.

    Raises ConfigError: no such folder, row, or a damaged one.
    """
    check_field(split in SPLITS, "split", split, ", ".join(SPLITS))
    path = local_folder(folder)
    rows = TokenRows(path, split, patient=False)  # somebody waits for it
    allowed = f"0 to {len(rows) - 1}" if len(rows) else f"nothing: {split} has no rows"
    check_field(0 <= number < len(rows), "row", number, allowed)
    ids, weights, segments = rows.stream(number)
    return ShownRow(
        folder=folder,
        split=split,
        number=number,
        rows=len(rows),
        chat=rows.manifest.chat is not None,
        ids=ids.tolist(),
        weights=weights.tolist(),
        segments=segments.tolist(),
        padding=rows.manifest.seq_len + 1 - len(ids),
        tokenizer=rows.manifest.load_tokenizer(path),
    )
