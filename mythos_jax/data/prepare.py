"""Text to token rows, once: OUT/train.array_record, OUT/held_out.array_record, OUT/manifest.json.

The tokens of a split are one stream, an end-of-document token E around each document: `E doc1 E doc2 E`. Row r of T
targets holds stream[r T : r T + T + 1]: neighbours share one token, so each token but the first E is a target exactly
once. The last row is shorter. A row is one ArrayRecord record, its tokens little-endian uint16 or uint32.

The way there is `pieces -> units of tokens (data/units.py, in parallel, kept until the end) -> RowWriter`. All is made
in a sibling folder, OUT.partial-HASH, that a killed run leaves behind: the same command finds it and goes on, and the
result is the same to the bit. What another command left there is deleted when its process is gone.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mythos_jax.config import Config
from mythos_jax.data.manifest import MANIFEST_FILE, SPLITS, Manifest, Split, file_sha256, load_manifest, rows_file
from mythos_jax.data.sources import Input, find_inputs
from mythos_jax.data.tokenizer import Tokenizer, load_tokenizer
from mythos_jax.data.units import UNIT_BYTES, Tokeniser, Tokens, is_held_out, tokenised
from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote
from mythos_jax.typed import check_field

__all__ = ["ensure_prepared", "is_held_out", "prepare"]


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    seq_len: int,
    held_out_fraction: float,
    max_bytes: int = 0,
    workers: int = 0,
    progress: bool = True,
) -> Manifest:
    """Tokenises `sources` (see data/sources.py) into the folder `out` and returns its manifest.

    `seq_len`: targets a row. `held_out_fraction`: of the documents, by a hash of their names. `max_bytes`: of text;
    0: all. `workers`: threads that tokenise, 0: one per core; the result does not depend on them. `progress`: a bar on
    a terminal. All is written beside `out` and renamed at the end, so `out` is whole or not there; killed, the same
    call goes on. Where `out` is there already it stays, and holding anything but the same data is an error.

    Raises ConfigError: bad sources, no text, an empty split, `out` taken or not writable, a full disk.
    """
    check_field(seq_len >= 1, "seq_len", seq_len, "an integer >= 1")
    check_field(0 <= held_out_fraction < 1, "held_out_fraction", held_out_fraction, "a fraction in [0, 1)")
    check_field(max_bytes >= 0, "max_bytes", max_bytes, "an integer >= 0")
    check_field(workers >= 0, "workers", workers, "an integer >= 0")
    check_field(len(sources) > 0, "sources", list(sources), "files, folders, or stdlib")
    if is_remote(out):
        raise ConfigError(f"{out}: rows are prepared on a disk; allowed: a local folder, which you then copy there")
    sources = tuple(str(source) for source in sources)
    out, encoder = Path(out), load_tokenizer(tokenizer)
    there = load_manifest(out) if (out / MANIFEST_FILE).exists() else None
    if there is not None:
        asked = {"seq_len": seq_len, "sources": sources, "held_out_fraction": held_out_fraction, "max_bytes": max_bytes}
        _require_same(there, out, encoder, asked)
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: is there and holds something else; allowed: a new folder")
    inputs, skipped = find_inputs(sources)

    request = Manifest(
        seq_len=seq_len,
        dtype="<u2" if encoder.vocab_size <= 1 << 16 else "<u4",
        tokenizer=encoder.name,
        tokenizer_fingerprint=encoder.fingerprint,
        vocab_size=encoder.vocab_size,
        end_of_document=encoder.end_of_document,
        splits={},
        sources=sources,
        held_out_fraction=held_out_fraction,
        max_bytes=max_bytes,
        skipped=skipped,
        inputs=_hash_of(inputs),
    )
    if there is not None and there.inputs == request.inputs:
        return there
    whole = Path(os.path.abspath(out))  # "." has no name to put a sibling beside
    try:
        with _partial(whole, _request_hash(request)) as partial:
            (partial / "units").mkdir(exist_ok=True)
            rows = partial / "rows"
            shutil.rmtree(rows, ignore_errors=True)
            rows.mkdir()
            tokenise = Tokeniser(encoder, request.dtype, held_out_fraction, partial / "units")
            units = tokenised(inputs, max_bytes, tokenise, workers or _cores())
            splits = _write_rows(_with_progress(units, inputs, max_bytes, progress), rows, request)
            _require_text(splits, sources, held_out_fraction)
            encoder.save(rows)
            manifest = replace(request, splits=splits)
            manifest.save(rows)
            return _settle(rows, out, manifest)
    except OSError as error:  # of reading, sources.py has made a ConfigError
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error})") from None


def ensure_prepared(
    config: Config, *, progress: bool = True, path: str | Path | None = None, prepare_missing: bool = True
) -> Manifest:
    """The manifest of the data that a config trains on; prepares `config.data_path` first when it is not there.

    path: another folder, such as a part of a mixture. prepare_missing: False where another process has prepared it.
    Raises ConfigError: as `prepare` does; nothing there and no `data.sources`; a folder prepared with another
    seq_len, tokenizer or (where the config names sources) from other text; a damaged folder; a tokenizer whose
    vocabulary exceeds the model's.
    """
    data, folder = config.data, Path(path or config.data_path)
    tokenizer = load_tokenizer(data.tokenizer)
    allowed = f"at least {tokenizer.vocab_size}, the vocabulary of tokenizer {data.tokenizer}"
    check_field(config.model.vocab_size >= tokenizer.vocab_size, "model.vocab_size", config.model.vocab_size, allowed)
    if (folder / MANIFEST_FILE).exists():
        manifest = load_manifest(folder)
        asked = {"seq_len": data.seq_len}
        if data.sources:
            asked |= {"sources": data.sources, "held_out_fraction": data.held_out_fraction, "max_bytes": data.max_bytes}
        _require_same(manifest, folder, tokenizer, asked, "data.")
        return manifest
    if not prepare_missing:
        raise ConfigError(f"data.path: nothing prepared at {folder}; allowed: a folder that all processes share")
    if not data.sources:
        if data.mixture:
            raise ConfigError(f"data.mixture: nothing prepared at {folder}; allowed: what `mythos data prepare` made")
        raise ConfigError(f"data.path: nothing prepared at {folder}, and data.sources names nothing to prepare it from")
    return prepare(
        data.sources,
        folder,
        tokenizer=data.tokenizer,
        seq_len=data.seq_len,
        held_out_fraction=data.held_out_fraction,
        max_bytes=data.max_bytes,
        progress=progress,
    )


class RowWriter:
    """Cuts the token stream of one split into rows and writes them to an ArrayRecord file."""

    def __init__(self, path: Path, seq_len: int, dtype: str, end_of_document: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path, self.seq_len = path, seq_len
        self.documents = self.text_bytes = self.rows = self.written = 0
        self._end_of_document = np.array([end_of_document], dtype)
        self._pending = np.array([], dtype)  # the stream from the start of the next row
        self._content = hashlib.sha256()
        self._writer = ArrayRecordWriter(str(path), "group_size:1")  # 1: a row is read without its neighbours

    def add(self, tokens: np.ndarray, text_bytes: int, begins: bool) -> None:
        """Appends a document (`begins`) or the next part of the last one."""
        self.documents += begins
        self.text_bytes += text_bytes
        self._append([self._end_of_document, tokens] if begins else [tokens])

    def close(self) -> Split:
        """Writes what is left, and closes the file."""
        if self.documents:
            self._append([self._end_of_document])
        if len(self._pending) > 1:
            self._write(self._pending)
        self._close()
        self._read_back()
        targets = self.written - self.rows  # each row's first token is a target of the row before, or none
        size, checksum = self.path.stat().st_size, file_sha256(self.path)
        return Split(self.documents, self.text_bytes, targets, self.rows, self._content.hexdigest(), size, checksum)

    def _append(self, parts: list[np.ndarray]) -> None:
        stream = np.concatenate([self._pending, *(part.astype(self._pending.dtype) for part in parts)])
        whole = max(len(stream) - 1, 0) // self.seq_len
        for start in range(0, whole * self.seq_len, self.seq_len):
            self._write(stream[start : start + self.seq_len + 1])
        self._pending = stream[whole * self.seq_len :]

    def _write(self, row: np.ndarray) -> None:
        record = row.tobytes()
        self._content.update(record)
        self.rows += 1
        self.written += len(row)
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._failed(error) from None

    def _close(self) -> None:
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._failed(error) from None

    def _read_back(self) -> None:
        """Compares the file, as it is on disk, with what was written. Raises ConfigError where they differ."""
        from array_record.python.array_record_module import ArrayRecordReader

        content, reader = hashlib.sha256(), ArrayRecordReader(str(self.path))
        count = reader.num_records()
        try:
            for start in range(0, count, 1024):
                for record in reader.read(start, min(start + 1024, count)):
                    content.update(record)
        except RuntimeError as error:
            raise ConfigError(f"{self.path}: cannot be read back ({str(error).split(';')[0]})") from None
        if count != self.rows or content.digest() != self._content.digest():
            raise ConfigError(f"{self.path}: reads back other rows than were written; is the disk sound?")

    def abandon(self) -> None:
        """Closes the file after a failure, whose error is the one to report."""
        with contextlib.suppress(RuntimeError):
            self._writer.close()

    def _failed(self, error: RuntimeError) -> ConfigError:
        # "write() failed: No space left on device; writing PATH; at byte 0; …": the first part says it.
        return ConfigError(f"{self.path}: cannot be written ({str(error).split(';')[0]})")


def _hash_of(inputs: Sequence[Input]) -> str:
    """Names the files as they are now."""
    about = [[item.name, str(item.path.absolute()), item.size, item.path.stat().st_mtime_ns] for item in inputs]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _request_hash(request: Manifest) -> str:
    """Names what a partial folder is a part of."""
    text = json.dumps([request.fingerprint, request.held_out_fraction, request.max_bytes, request.inputs, UNIT_BYTES])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def _partial(whole: Path, request: str) -> Iterator[Path]:
    """The folder to work in, locked, which may hold the units of a killed run. Left behind by a kill or Ctrl-C only.

    Where another process is at work on the same, a folder of our own: whoever is first wins.
    """
    folder = whole.with_name(f"{whole.name}.partial-{request}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if lock is None:
        folder = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")
        folder.mkdir()
        lock = _lock(folder)  # may still be none: a file system without locks
    try:
        _delete_stale(whole, folder)
        yield folder
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A locked file in `folder`, which the system unlocks when this process ends; None where it cannot be had."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _delete_stale(whole: Path, ours: Path) -> None:
    """Deletes what killed runs of other requests left beside `whole`."""
    for folder in whole.parent.glob(f"{whole.name}.partial-*"):
        if folder == ours or not folder.is_dir():
            continue
        if not (folder / "lock").exists():  # just made, and about to be locked? or from an older version
            if time.time() - folder.stat().st_mtime < 3600:
                continue
            shutil.rmtree(folder, ignore_errors=True)
        elif (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_rows(units: Iterable[Tokens], folder: Path, request: Manifest) -> dict[str, Split]:
    writers = {}
    try:
        for split in SPLITS:
            file = rows_file(folder, split)
            writers[split] = RowWriter(file, request.seq_len, request.dtype, request.end_of_document)
        for unit in units:
            for tokens, text_bytes, begins, held_out in unit:
                writers["held_out" if held_out else "train"].add(tokens, text_bytes, begins)
        return {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def _require_text(splits: dict[str, Split], sources: Sequence[str], held_out_fraction: float) -> None:
    total = sum(split.documents for split in splits.values())
    if not total:
        raise ConfigError(f"sources: no text in {', '.join(sources)}; allowed: at least one document that is not empty")
    if sum(split.tokens for split in splits.values()) == total:  # nothing but ends of documents
        raise ConfigError(f"sources: the tokenizer makes no tokens of the text in {', '.join(sources)}")
    for name, split in splits.items():
        if not split.documents and (name == "train" or held_out_fraction > 0):
            raise ConfigError(
                f"held_out_fraction: got {held_out_fraction}, which leaves none of {total} documents for the {name} "
                "split; allowed: a fraction that does (or 0: keep none back), or more documents"
            )


def _with_progress(
    units: Iterator[Tokens], inputs: Sequence[Input], max_bytes: int, progress: bool
) -> Iterator[Tokens]:
    from tqdm import tqdm

    total = sum(item.size for item in inputs)
    total = min(total, max_bytes) if max_bytes else total
    compressed = any(item.path.suffix == ".parquet" for item in inputs)  # then file sizes say little
    disable = None if progress else True  # None: shown on a terminal only
    bar = tqdm(total=None if compressed else total, unit="B", unit_scale=True, desc="tokenising", disable=disable)
    with bar:
        for unit in units:
            yield unit
            bar.update(int(unit.text_bytes.sum()))


def _settle(partial: Path, out: Path, manifest: Manifest) -> Manifest:
    """Moves the finished folder into place, or finds the same data there (from before, or from another process)."""
    if not (out / MANIFEST_FILE).exists():
        try:
            partial.rename(os.path.abspath(out))
            return manifest
        except OSError:
            if not (out / MANIFEST_FILE).exists():
                raise
    there = load_manifest(out)
    if there.fingerprint != manifest.fingerprint:
        raise ConfigError(f"{out}: holds other data (the sources have changed since); delete it, or choose another")
    return there


def _require_same(
    manifest: Manifest, folder: Path, tokenizer: Tokenizer, asked: dict[str, object], prefix: str = ""
) -> None:
    """Raises ConfigError where a prepared folder is not the one asked for; `prefix` is put before a field's name."""
    remedy = f"with which {folder} was prepared (or delete that folder, or choose another)"
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        ours, theirs = (
            f"{name} (fingerprint {fingerprint[:12]})"
            for name, fingerprint in [
                (tokenizer.name, tokenizer.fingerprint),
                (manifest.tokenizer, manifest.tokenizer_fingerprint),
            ]
        )
        raise ConfigError(f"{prefix}tokenizer: got {ours}, allowed: {theirs}, {remedy}")
    for name, value in asked.items():
        there = getattr(manifest, name)
        check_field(value == there, prefix + name, value, f"{there!r}, {remedy}")
