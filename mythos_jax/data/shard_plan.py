"""Rows of text that many workers write, a shard each: which tokens a shard holds is a function of counts alone.

The tokens of a split are one stream (rows.py), to which every unit adds a stretch of known length. So the place of each
unit in the stream is a sum over those before it, and a worker with a few of the units writes a shard.
"""

import bisect
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mythos_jax.data.manifest import SPLITS, Manifest, Shard, Split, shards_sha256
from mythos_jax.data.readers import LeftOut
from mythos_jax.data.rows import RowWriter
from mythos_jax.data.shards import Layout, shard_name
from mythos_jax.data.stored_rows import Shards, all_rows
from mythos_jax.data.units import TokenUnit
from mythos_jax.data.work_files import WorkFiles
from mythos_jax.data.write_rows import Choice, Written, check_not_empty, document_to_move

LoadUnit = Callable[[int, int], TokenUnit]  # by the numbers of its part, and of the unit in it
_ONE_FILE = 1 << 62  # bytes


@dataclass(frozen=True)
class UnitCount:
    """What a unit adds to each split: [documents, bytes of text, tokens]; and what `Written` records of it. text: the
    hash of its text."""

    part: int
    number: int
    text: str
    splits: dict[str, list[int]]
    nearest: dict[str, list[int]]  # the numbers are those in the unit
    left_out: list[dict[str, Any]]

    @property
    def documents(self) -> int:
        return sum(documents for documents, _, _ in self.splits.values())


def count_unit(part: int, number: int, unit: TokenUnit, choice: Choice, documents_before: int = 0) -> UnitCount:
    """Counts a unit. documents_before: as far as it matters which document `choice` moves."""
    written, splits = Written(), {split: [0, 0, 0] for split in SPLITS}
    for document, draw, split, piece in _pieces(unit, choice, documents_before):
        added = (int(piece.begins), piece.text_bytes, len(piece.tokens))
        splits[split] = [old + new for old, new in zip(splits[split], added, strict=True)]
        if piece.begins:
            written.see(split, draw, document - documents_before)
    nearest = {split: list(found) for split, found in written.nearest.items()}
    return UnitCount(part, number, str(unit.text), splits, nearest, [asdict(item) for item in unit.leaves_out()])


def _pieces(unit: TokenUnit, choice: Choice, documents_before: int) -> Iterator[tuple[int, int, str, Any]]:
    """The number of each piece's document, its draw, its split, and the piece."""
    document = documents_before - 1
    for draw, piece in unit:
        document += piece.begins
        yield document, draw, choice.split(draw, document), piece


@dataclass(frozen=True)
class ShardPlan:
    """The tokens of a split's stream from `start` up to `end`, which become shard `number` of `count`. ends_stream:
    whether the last of them ends the last document. units: those that hold them, each as its part, its number, the hash
    of its text, the place in the stream where it starts, and the number of documents before it."""

    split: str
    number: int
    count: int
    start: int
    end: int
    ends_stream: bool
    moved: int | None
    units: list[list[Any]]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number, self.count)

    def key(self, request: Manifest) -> str:
        """A hash of what the shard's bytes depend on, besides the tokenizer."""
        options = [request.seq_len, request.dtype, request.end_of_document, request.held_out_fraction]
        return hashlib.sha256(json.dumps([options, asdict(self)]).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """written: all that is known before the shards are written; its splits say nothing of files."""

    written: Written
    shards: list[ShardPlan] = field(default_factory=list)


def make_plan(counts: Sequence[UnitCount], request: Manifest, shard_bytes: int, load: LoadUnit) -> Plan:
    """The shards of the units, which are in order. Raises ConfigError if there is nothing to train on."""
    written = _sum(counts)
    check_not_empty(written, request)
    empty, moved = written.empty_split(), document_to_move(written, request)
    if moved is not None:
        counts = list(_moved(counts, Choice(request.held_out_fraction, moved), load))
        written = _sum(counts)
        written.filled = empty
    row_bytes = (request.seq_len + 1) * np.dtype(request.dtype).itemsize
    shard_rows = max(shard_bytes // Layout(row_bytes).stride, 1)
    shards: list[ShardPlan] = []
    for split in SPLITS:
        # Before each document, and at the end of all, is a token that ends a document.
        lengths = [count.splits[split][0] + count.splits[split][2] for count in counts]
        starts = list(itertools.accumulate(lengths, initial=0))
        documents = list(itertools.accumulate((count.documents for count in counts), initial=0))
        targets = starts[-1]
        number_of_shards = -(-targets // (shard_rows * request.seq_len))
        for number in range(number_of_shards):
            start = number * shard_rows * request.seq_len
            end = min(start + shard_rows * request.seq_len, targets) + 1
            first, after = bisect.bisect_right(starts, start) - 1, bisect.bisect_left(starts, end)
            units = [
                [count.part, count.number, count.text, starts[i], documents[i]]
                for i, count in enumerate(counts[first:after], start=first)
                if lengths[i]
            ]
            shards.append(ShardPlan(split, number, number_of_shards, start, end, end > targets, moved, units))
    return Plan(written, shards)


def _sum(counts: Sequence[UnitCount]) -> Written:
    written = Written()
    totals = {split: np.zeros(3, np.int64) for split in SPLITS}
    before = 0
    for count in counts:
        written.note(LeftOut(**item) for item in count.left_out)
        for split, added in count.splits.items():
            totals[split] += added
        for split, (distance, number) in count.nearest.items():
            if split not in written.nearest or distance < written.nearest[split][0]:
                written.nearest[split] = (distance, before + number)
        before += count.documents
    for split, (documents, text_bytes, tokens) in ((name, total.tolist()) for name, total in totals.items()):
        written.splits[split] = Split(documents, text_bytes, documents + tokens, 0, "", 0, "")
    return written


def _moved(counts: Sequence[UnitCount], choice: Choice, load: LoadUnit) -> Iterator[UnitCount]:
    """Counts those units again that hold a piece of the document that changes its split."""
    before = 0
    for count in counts:
        if choice.moved is not None and before - 1 <= choice.moved < before + count.documents:
            unit = load(count.part, count.number)
            count = count_unit(count.part, count.number, unit, choice, before)
        yield count
        before += count.documents


def write_shard(
    plan: ShardPlan, request: Manifest, load: LoadUnit, files: WorkFiles, scratch: str | None = None
) -> Shard:
    """Writes a shard into the folder `files`. scratch: a folder for what is deleted again.

    Raises ConfigError and OSError as `RowFile` does.
    """
    choice = Choice(request.held_out_fraction, plan.moved)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        writer = RowWriter(
            folder, plan.split, request.seq_len, request.dtype, request.end_of_document, shard_bytes=_ONE_FILE
        )
        try:
            end_of_document = np.array([request.end_of_document], request.dtype)
            for part, number, text, start, documents_before in plan.units:
                unit, stream = load(part, number), [np.array([], request.dtype)]
                if str(unit.text) != text:
                    raise OSError(f"unit {part}-{number} has changed while rows were written")
                for _, _, split, piece in _pieces(unit, choice, documents_before):
                    if split == plan.split:
                        stream += [end_of_document, piece.tokens] if piece.begins else [piece.tokens]
                writer.append([np.concatenate(stream)[max(plan.start - start, 0) : max(plan.end - start, 0)]])
            if plan.ends_stream:
                writer.append([end_of_document])
            (shard,) = writer.close().shards
        except BaseException:
            writer.abandon()
            raise
        files.put(folder / shard_name(plan.split, 0, 1), plan.name)
    return shard


def finish_split(split: Split, shards: Sequence[Shard], content: str, request: Manifest) -> Split:
    """What the manifest says of a split whose shards are written. content: as `split_content` finds it."""
    return Split(
        documents=split.documents,
        text_bytes=split.text_bytes,
        tokens=split.tokens,
        rows=sum(shard.rows for shard in shards),
        content=content,
        file_bytes=sum(shard.file_bytes for shard in shards),
        sha256=shards_sha256(shards),
        row_bytes=(request.seq_len + 1) * np.dtype(request.dtype).itemsize,
        shards=tuple(shards),
    )


def split_content(split: str, shards: Sequence[Shard], request: Manifest, folder: str) -> str:
    """The hash of all rows of a split, in order: read from its files. Raises as reading rows does."""
    empty = Split(0, 0, 0, 0, "", 0, "")
    written = finish_split(empty, shards, "", request)
    rows = Shards(folder, split, Manifest(**vars(request) | {"splits": {split: written}}))
    content = hashlib.sha256()
    for row in all_rows(rows, written.rows):
        content.update(row)
    return content.hexdigest()
