"""Writes the rows of both splits from tokenized units."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mythos_jax.data.input_file import one_line_path
from mythos_jax.data.manifest import SPLITS, ChatSplit, Manifest, Split
from mythos_jax.data.pack import PackedWriter
from mythos_jax.data.readers import LeftOut
from mythos_jax.data.rows import RowWriter
from mythos_jax.data.split import DRAWS
from mythos_jax.data.text_parts import LISTED
from mythos_jax.data.units import TokenUnit
from mythos_jax.errors import ConfigError


@dataclass
class Written:
    """What one pass over the units has written and seen. nearest: for each split, the distance and the number of the
    document of the other split whose draw is nearest to it. filled: the split that has a document only because one has
    changed its split."""

    splits: dict[str, Split] = field(default_factory=dict)
    chats: dict[str, ChatSplit] = field(default_factory=dict)
    nearest: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    left_out_count: int = 0
    filled: str = ""

    def see(self, split: str, draw: int, number: int) -> None:
        """Records the draw of document `number`, which is in `split`."""
        other, distance = ("train", -draw) if split == "held_out" else ("held_out", draw)
        if other not in self.nearest or distance < self.nearest[other][0]:
            self.nearest[other] = (distance, number)

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    def empty_split(self) -> str:
        """The split that has no document; empty if both have some."""
        return next((name for name, split in self.splits.items() if not split.documents), "")

    def note(self, items: Iterable[LeftOut]) -> None:
        """Records what a unit leaves out."""
        for item in items:
            self.left_out_count += item.count
            if len(self.left_out) < LISTED:
                self.left_out.append(item)


@dataclass(frozen=True)
class Choice:
    """Which documents are held out. moved: the number of one that changes its split."""

    held_out_fraction: float
    moved: int | None = None

    def split(self, draw: int, number: int) -> str:
        held_out = (draw < self.held_out_fraction * DRAWS) != (number == self.moved)
        return "held_out" if held_out else "train"


def write_rows(units: Callable[[], Iterable[TokenUnit]], folder: Path, request: Manifest, shard_bytes: int) -> Written:
    """Writes the rows of units into `folder`, made anew, in files of about `shard_bytes`. units: called again if a
    split would be empty, because which document moves there is known only when all have been seen.

    Raises ConfigError: there is nothing to train on; the files cannot be written.
    """
    written = _write(units(), folder, request, shard_bytes, Choice(request.held_out_fraction))
    check_not_empty(written, request)
    empty = written.empty_split()
    if (moved := document_to_move(written, request)) is not None:
        written = _write(units(), folder, request, shard_bytes, Choice(request.held_out_fraction, moved))
        written.filled = empty
    return written


def document_to_move(written: Written, request: Manifest) -> int | None:
    """The number of the document that changes its split, so that none is empty; None: none does."""
    empty = written.empty_split()
    alone = written.documents == 1 and empty == "held_out"  # a conversation is not divided, as a text is
    return written.nearest[empty][1] if empty and request.held_out_fraction and not alone else None


def _write(units: Iterable[TokenUnit], folder: Path, request: Manifest, shard_bytes: int, choice: Choice) -> Written:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    written, number = Written(), -1
    writers: dict[str, RowWriter | PackedWriter] = {}
    kind: type[RowWriter] | type[PackedWriter] = RowWriter if request.chat is None else PackedWriter
    try:
        for split in SPLITS:
            writers[split] = kind(folder, split, request.seq_len, request.dtype, request.end_of_document, shard_bytes)
        for unit in units:
            written.note(unit.leaves_out())
            for draw, piece in unit:
                number += piece.begins
                split = choice.split(draw, number)
                writers[split].add(piece)
                if piece.begins:
                    written.see(split, draw, number)
        written.splits = {split: writer.close() for split, writer in writers.items()}
        packed = {split: writer for split, writer in writers.items() if isinstance(writer, PackedWriter)}
        written.chats = {split: writer.counts() for split, writer in packed.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    return written


def check_not_empty(written: Written, request: Manifest) -> None:
    """Raises ConfigError if there is nothing to train on."""
    sources = ", ".join(map(one_line_path, request.sources))
    left_out = (
        f" ({written.left_out_count:,} left out, the first: {written.left_out[0].text})" if written.left_out else ""
    )
    if not written.documents:
        what, one = (
            ("text", "document that is not empty") if request.chat is None else ("conversations", "conversation")
        )
        raise ConfigError(f"sources: no {what} in {sources}{left_out}; allowed: at least one {one}")
    if request.chat is not None:
        if not any(split.rows for split in written.splits.values()):
            allowed = f"more than {request.seq_len}, so that at least one answer has room"
            raise ConfigError(f"seq_len: got {request.seq_len}, allowed for {sources}: {allowed}")
        return
    if sum(split.tokens for split in written.splits.values()) == written.documents:  # only the ends of documents
        raise ConfigError(f"sources: the tokenizer produces no tokens from the text in {sources}")
