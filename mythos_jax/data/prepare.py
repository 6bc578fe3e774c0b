"""Prepares text once: writes OUT/train.array_record, OUT/held_out.array_record and OUT/manifest.json.

Text is read in pieces (sources.py), tokenized in parallel in units that are kept until the end (units.py), and cut into
rows (rows.py). All of this happens in a sibling folder (work_folder.py), which is renamed to OUT when it is complete.
After a kill, the same command resumes there, and the result is identical to the bit.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mythos_jax.config import Config
from mythos_jax.data.manifest import MANIFEST_FILE, SPLITS, Manifest, Split, load_manifest, rows_file
from mythos_jax.data.rows import RowWriter
from mythos_jax.data.sources import InputFile, find_inputs
from mythos_jax.data.tokenizer import Tokenizer, load_tokenizer
from mythos_jax.data.units import UNIT_BYTES, TokenUnit, UnitTokenizer, tokenize_units
from mythos_jax.data.work_folder import work_folder
from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote
from mythos_jax.progress import Progress
from mythos_jax.typed import check_field


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
    """Tokenizes `sources` (see sources.py) into rows in the folder `out`, and returns its manifest.

    seq_len: targets per row. held_out_fraction: of the documents, chosen by a hash of their names. max_bytes: of text;
    0: all. workers: threads that tokenize; 0: one per core; the result does not depend on it. progress: show a
    progress bar on a terminal.

    `out` appears only when it is complete; after a kill, the same call resumes. An existing `out` is never
    overwritten: it is returned if it holds the same data.

    Raises ConfigError: invalid sources, no text, an empty split, `out` exists with other content, `out` is not
    writable, a full disk.
    """
    _check_arguments(sources, out, seq_len, held_out_fraction, max_bytes, workers)
    out, encoder = Path(out), load_tokenizer(tokenizer)
    request = Manifest(
        seq_len=seq_len,
        dtype="<u2" if encoder.vocab_size <= 1 << 16 else "<u4",
        tokenizer=encoder.name,
        tokenizer_fingerprint=encoder.fingerprint,
        vocab_size=encoder.vocab_size,
        end_of_document=encoder.end_of_document,
        splits={},
        sources=tuple(str(source) for source in sources),
        held_out_fraction=held_out_fraction,
        max_bytes=max_bytes,
    )
    existing = _existing_manifest(out, request, encoder)
    inputs, skipped = find_inputs(request.sources)
    request = replace(request, skipped=skipped, inputs=_hash_inputs(inputs))
    if existing is not None and existing.inputs == request.inputs:
        return existing
    absolute = Path(os.path.abspath(out))  # "." has no name for the work folder to derive its own from
    try:
        with work_folder(absolute, _hash_request(request)) as folder:
            (folder / "units").mkdir(exist_ok=True)
            tokenize = UnitTokenizer(encoder, request.dtype, held_out_fraction, folder / "units")
            units = tokenize_units(inputs, max_bytes, tokenize, workers or _available_cores())
            manifest = _write_rows(_with_progress(units, inputs, max_bytes, progress), folder / "rows", request)
            encoder.save(folder / "rows")
            manifest.save(folder / "rows")
            return _publish(folder / "rows", out, manifest)
    except OSError as error:  # of writing: reading raises ConfigError
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error})") from None


def ensure_prepared(
    config: Config, *, progress: bool = True, path: str | Path | None = None, prepare_missing: bool = True
) -> Manifest:
    """The manifest of the data that a config trains on; prepares `config.data_path` first if it is missing.

    path: another folder, such as a part of a mixture. prepare_missing: False if another process has prepared it.

    Raises ConfigError: as `prepare` does; nothing prepared and no `data.sources`; a folder prepared with another
    seq_len, tokenizer or (if the config names sources) from other text; a damaged folder; a tokenizer whose
    vocabulary exceeds the model's.
    """
    data, folder = config.data, Path(path or config.data_path)
    tokenizer = load_tokenizer(data.tokenizer)
    allowed = f"at least {tokenizer.vocab_size}, the vocabulary of tokenizer {data.tokenizer}"
    check_field(config.model.vocab_size >= tokenizer.vocab_size, "model.vocab_size", config.model.vocab_size, allowed)
    if (folder / MANIFEST_FILE).exists():
        manifest = load_manifest(folder)
        _check_tokenizer(manifest, folder, tokenizer, "data.tokenizer")
        requested: dict[str, object] = {"seq_len": data.seq_len}
        if data.sources:
            requested |= {
                "sources": data.sources,
                "held_out_fraction": data.held_out_fraction,
                "max_bytes": data.max_bytes,
            }
        _check_request(manifest, folder, requested, prefix="data.")
        return manifest
    if not prepare_missing:
        raise ConfigError(f"data.path: nothing prepared at {folder}; allowed: a folder that all processes share")
    if data.mixture:
        raise ConfigError(f"data.mixture: nothing prepared at {folder}; allowed: folders made by `mythos data prepare`")
    if not data.sources:
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


def _check_arguments(
    sources: Sequence[str], out: str | Path, seq_len: int, held_out_fraction: float, max_bytes: int, workers: int
) -> None:
    check_field(seq_len >= 1, "seq_len", seq_len, "an integer >= 1")
    check_field(0 <= held_out_fraction < 1, "held_out_fraction", held_out_fraction, "a fraction in [0, 1)")
    check_field(max_bytes >= 0, "max_bytes", max_bytes, "an integer >= 0")
    check_field(workers >= 0, "workers", workers, "an integer >= 0")
    check_field(len(sources) > 0, "sources", list(sources), "files, folders, or stdlib")
    if is_remote(out):
        raise ConfigError(f"{out}: rows are prepared on a disk; allowed: a local folder, which you then copy there")


def _existing_manifest(out: Path, request: Manifest, tokenizer: Tokenizer) -> Manifest | None:
    """The manifest in `out`; None if it is a new or empty folder.

    Raises ConfigError: it was prepared by another request, or holds something else.
    """
    if (out / MANIFEST_FILE).exists():
        manifest = load_manifest(out)
        _check_tokenizer(manifest, out, tokenizer, "tokenizer")
        names = ("seq_len", "sources", "held_out_fraction", "max_bytes")
        _check_request(manifest, out, {name: getattr(request, name) for name in names})
        return manifest
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: already exists and holds something else; allowed: a new folder")
    return None


def _check_tokenizer(manifest: Manifest, folder: Path, tokenizer: Tokenizer, name: str) -> None:
    """Raises ConfigError if `folder` was prepared with another tokenizer; `name` is what the user calls it."""
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        got = f"{tokenizer.name} (fingerprint {tokenizer.fingerprint[:12]})"
        allowed = f"{manifest.tokenizer} (fingerprint {manifest.tokenizer_fingerprint[:12]})"
        raise ConfigError(f"{name}: got {got}, allowed: {allowed}, {_remedy(folder)}")


def _check_request(manifest: Manifest, folder: Path, requested: Mapping[str, object], prefix: str = "") -> None:
    """Raises ConfigError if `folder` was prepared with other values; `prefix` precedes a field's name."""
    for name, value in requested.items():
        prepared_with = getattr(manifest, name)
        check_field(value == prepared_with, prefix + name, value, f"{prepared_with!r}, {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    return f"with which {folder} was prepared (or delete that folder, or choose another)"


def _hash_inputs(inputs: Sequence[InputFile]) -> str:
    """Identifies the files and their current state."""
    state = [[file.name, str(file.path.absolute()), file.size, file.path.stat().st_mtime_ns] for file in inputs]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _hash_request(request: Manifest) -> str:
    """Identifies everything that the units in a work folder depend on."""
    text = json.dumps([request.fingerprint, request.held_out_fraction, request.max_bytes, request.inputs, UNIT_BYTES])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _available_cores() -> int:
    # The affinity mask, where the system has one: a container may be limited to a few of the machine's cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_rows(units: Iterable[TokenUnit], folder: Path, request: Manifest) -> Manifest:
    """Writes the rows of both splits into `folder`, made anew, and returns the completed manifest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writers: dict[str, RowWriter] = {}
    try:
        for split in SPLITS:
            file = rows_file(folder, split)
            writers[split] = RowWriter(file, request.seq_len, request.dtype, request.end_of_document)
        for unit in units:
            for tokens, text_bytes, begins, held_out in unit:
                writers["held_out" if held_out else "train"].add(tokens, text_bytes, begins)
        splits = {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    _check_not_empty(splits, request)
    return replace(request, splits=splits)


def _check_not_empty(splits: Mapping[str, Split], request: Manifest) -> None:
    sources = ", ".join(request.sources)
    documents = sum(split.documents for split in splits.values())
    if not documents:
        raise ConfigError(f"sources: no text in {sources}; allowed: at least one document that is not empty")
    if sum(split.tokens for split in splits.values()) == documents:  # only the ends of documents
        raise ConfigError(f"sources: the tokenizer produces no tokens from the text in {sources}")
    for name, split in splits.items():
        if not split.documents and (name == "train" or request.held_out_fraction > 0):
            raise ConfigError(
                f"held_out_fraction: got {request.held_out_fraction}, which leaves none of {documents} documents for "
                f"the {name} split; allowed: a fraction that does, 0 to hold out nothing, or more documents"
            )


def _with_progress(
    units: Iterable[TokenUnit], inputs: Sequence[InputFile], max_bytes: int, progress: bool
) -> Iterator[TokenUnit]:
    """Passes the units on, and shows how much text has been read."""
    file_bytes = sum(file.size for file in inputs)
    expected_bytes = min(file_bytes, max_bytes) if max_bytes else file_bytes
    is_compressed = any(file.path.suffix == ".parquet" for file in inputs)  # then file sizes say little about the text
    total = None if is_compressed else expected_bytes
    with Progress(total, "tokenizing", "B", show=progress) as bar:
        for unit in units:
            yield unit
            bar.update(int(unit.text_bytes.sum()))


def _publish(rows: Path, out: Path, manifest: Manifest) -> Manifest:
    """Renames the complete folder to `out`, unless the same data is there already.

    It may be there from before (only the times of the inputs have changed), or from another process that was faster.
    """
    if not (out / MANIFEST_FILE).exists():
        try:
            rows.rename(os.path.abspath(out))
            return manifest
        except OSError:
            if not (out / MANIFEST_FILE).exists():
                raise
    existing = load_manifest(out)
    if existing.fingerprint != manifest.fingerprint:
        raise ConfigError(f"{out}: holds different data (the sources have changed); delete it, or choose another")
    return existing
