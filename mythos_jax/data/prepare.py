"""Prepares text once: writes the rows of both splits (shards.py) and OUT/manifest.json.

Text is read in pieces (readers.py), tokenized in parallel in units that are kept until the end (units.py), and cut into
rows (write_rows.py). All of this happens in a sibling folder (work_folder.py), which is renamed to OUT when it is
complete. After a kill or an error, the same command resumes there, and the result is identical to the bit.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from mythos_jax.data.chat_counts import say_chats
from mythos_jax.data.chat_encoder import ChatEncoder, make_chat_encoder
from mythos_jax.data.chat_units import ChatUnitEncoder
from mythos_jax.data.conventions import save_conventions
from mythos_jax.data.destination import Destination
from mythos_jax.data.input_file import RECORD_SUFFIXES, SUFFIXES, InputFile, one_line_path
from mythos_jax.data.manifest import MANIFEST_FILE, Chats, Manifest
from mythos_jax.data.part_worker import Job
from mythos_jax.data.prepare_beam import Runner, check_runner, write_on_workers
from mythos_jax.data.readers import Reading
from mythos_jax.data.shards import SHARD_BYTES
from mythos_jax.data.sources import Found, find_inputs
from mythos_jax.data.split import Division, find_division
from mythos_jax.data.text_parts import UNIT_BYTES, TextStream
from mythos_jax.data.tokenizer import Tokenizer, load_tokenizer
from mythos_jax.data.units import TextEncoder, TokenUnit, UnitTokenizer, tokenize_units
from mythos_jax.data.work_files import WorkFiles
from mythos_jax.data.workers import Workers
from mythos_jax.data.write_rows import Written, write_rows
from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote
from mythos_jax.progress import Progress
from mythos_jax.streams import log
from mythos_jax.typed import check_field


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    end_of_document: str | None = None,
    seq_len: int,
    held_out_fraction: float,
    max_bytes: int = 0,
    text_column: str = "text",
    chat: bool = False,
    chat_template: str | Path = "",
    on_error: Literal["stop", "skip"] = "stop",
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    runner: str = "",
    runner_flags: Sequence[str] = (),
) -> Manifest:
    """Tokenizes `sources` (see sources.py) into rows in the folder `out`, and returns its manifest.

    end_of_document: the name of that token in the tokenizer, if it is none of the usual ones. seq_len: targets per row.
    held_out_fraction: of the documents, chosen by a hash of their names; of a single document, its end. max_bytes: of
    text; 0: all. text_column: of records; several with commas are joined. chat: the records are conversations
    (chat_record.py), and written as the model that the tokenizer is from does it, or as a Jinja file `chat_template`
    says. on_error: whether a file or record that cannot be read stops everything or is left out and listed in the
    manifest. workers: threads that tokenize (with Beam's direct runner: processes); 0: one per core; the result is the
    same. shard_bytes: how large a file of rows may become, more or less. progress: show a progress bar on a terminal.
    runner: of Apache Beam, to work on many machines (prepare_beam.py), with its own runner_flags; `out` may then be the
    URL of a folder in an object store.

    `out` appears only when it is complete; after a kill or an error, the same call resumes. An existing `out` is never
    overwritten: it is returned if it holds the same data.

    Raises ConfigError: invalid sources, no text, `out` exists with other content, `out` is not writable, a full disk.
    """
    reading = Reading(text_column, on_error == "skip", chat)
    _check_arguments(sources, reading, seq_len, held_out_fraction, max_bytes, workers, shard_bytes, on_error)
    where = _where(out, sources, workers or _available_cores(), runner, runner_flags)
    encoder = load_tokenizer(tokenizer, end_of_document)
    chats = make_chat_encoder(tokenizer, encoder, chat_template, seq_len) if chat else None
    request = Manifest(
        **_said_by(encoder),
        seq_len=seq_len,
        sources=tuple(str(source) for source in sources),
        held_out_fraction=held_out_fraction,
        max_bytes=max_bytes,
        text_column=text_column,
        chat=None if chats is None else Chats(chats.fingerprint),
    )
    place = Destination(out, _hash_request(request, chats))
    if (existing := place.existing()) is not None:
        _check_same(existing, str(place), request, encoder)
    found = _find(request, reading)
    request = with_inputs(request, found)
    if existing is not None and _is_current(existing, request, place):
        return existing
    division = None if chat else find_division(found.files, reading, max_bytes, held_out_fraction)
    stream = TextStream(found.files, reading, max_bytes, division)
    return _prepare(stream, place, encoder, chats, request, shard_bytes, where, progress)


def _where(out: str | Path, sources: Sequence[str], threads: int, runner: str, flags: Sequence[str]) -> Runner | int:
    """What does the work: a runner of Beam, or this number of threads. Raises ConfigError if it cannot write `out`."""
    if runner:
        chosen = Runner(runner, tuple(flags), threads)
        check_runner(chosen, sources, out)
        return chosen
    if is_remote(out):
        allowed = "allowed: a local folder, which you then copy there, or --runner"
        raise ConfigError(f"{out}: rows are prepared on a disk; {allowed}")
    return threads


def _said_by(encoder: Tokenizer) -> dict[str, Any]:
    """What a manifest has of its tokenizer, before there are rows."""
    return {
        "dtype": "<u2" if encoder.vocab_size <= 1 << 16 else "<u4",
        "tokenizer": encoder.name,
        "tokenizer_fingerprint": encoder.fingerprint,
        "vocab_size": encoder.vocab_size,
        "end_of_document": encoder.end_of_document,
        "splits": {},
    }


def _is_current(existing: Manifest, request: Manifest, place: Destination) -> bool:
    """Whether a folder is of the files that there are now. Raises ConfigError if it is of others and stays."""
    if existing.inputs == request.inputs:
        return True
    if have_changed(existing, request) or place.remote:
        raise place.holds_other_data()
    return False


def _find(request: Manifest, reading: Reading) -> Found:
    """The files to read. Says what is left out."""
    found = find_inputs(request.sources, reading.skip_errors, RECORD_SUFFIXES if reading.chat else SUFFIXES)
    for line in found.left_out:
        log(line)
    return found


def _prepare(
    stream: TextStream,
    place: Destination,
    encoder: Tokenizer,
    chats: ChatEncoder | None,
    request: Manifest,
    shard_bytes: int,
    where: Runner | int,
    progress: bool,
) -> Manifest:
    """where: a runner, or the number of threads here."""
    try:
        with place.working() as (work, rows):
            conventions = None if chats is None else chats.conventions
            job = Job(request, work, rows, shard_bytes, stream.reading.skip_errors, conventions)
            if isinstance(where, Runner):
                written = write_on_workers(stream, job, where, encoder)
            else:
                written = _write_here(stream, job, encoder, chats, where, progress)
            manifest = complete(request, written, stream.division)
            with tempfile.TemporaryDirectory() as folder:
                encoder.save(folder)
                if conventions:
                    save_conventions(folder, encoder, conventions)
                WorkFiles(rows).put_all(Path(folder))
            return place.publish(rows, manifest)
    except OSError as error:  # of writing: reading raises ConfigError
        raise ConfigError(f"{place}: cannot be written ({error.strerror or error})") from None


def _write_here(
    stream: TextStream, job: Job, encoder: Tokenizer, chats: ChatEncoder | None, threads: int, progress: bool
) -> Written:
    """Tokenizes in threads of this process, and writes the rows."""
    request, skip = job.request, job.skip_errors
    encode = ChatUnitEncoder(chats, request.dtype, skip) if chats else TextEncoder(encoder, request.dtype)
    with Workers(threads) as pool:
        tokenize = UnitTokenizer(encode, job.files.below("units"), skip, pool.stopped)
        first = [_with_progress(tokenize_units(stream, tokenize, pool), stream, progress)]

        def units() -> Iterable[TokenUnit]:
            return first.pop() if first else tokenize_units(stream, tokenize, pool)

        return write_rows(units, Path(job.rows), request, job.shard_bytes)


def complete(request: Manifest, written: Written, division: Division | None) -> Manifest:
    """The manifest of what has been written. Says how the documents are divided and what is left out."""
    _say_split(division, written, request)
    for item in written.left_out[:10]:
        log(f"left out: {item.text}")
    if written.left_out_count > 10:
        log(f"left out: {written.left_out_count:,} files and records in all; {MANIFEST_FILE} lists them")
    if request.chat is not None:
        say_chats(written.chats, request)
        request = replace(request, chat=replace(request.chat, splits=written.chats))
    return replace(
        request,
        splits=written.splits,
        left_out=(*request.left_out, *(item.text for item in written.left_out)),
        left_out_count=written.left_out_count,
    )


def _say_split(division: Division | None, written: Written, request: Manifest) -> None:
    """Says how the documents are divided where it is not the hash of their names alone."""
    share = f"{request.held_out_fraction:g}"
    if division:
        size = written.splits["held_out"].text_bytes
        log(f"{one_line_path(division.name)} is the only document; its last {size:,} bytes ({share}) are held out")
    elif request.held_out_fraction and written.documents == 1:
        log("there is only one conversation; it is trained on, and nothing is held out")
    elif written.filled:
        what = "held out" if written.filled == "held_out" else "trained on"
        documents = "documents" if request.chat is None else "conversations"
        log(
            f"held_out_fraction {share} leaves none of {written.documents:,} {documents} to be {what}; the one that is "
            f"nearest by its hash is {what}"
        )


def _check_arguments(
    sources: Sequence[str],
    reading: Reading,
    seq_len: int,
    held_out_fraction: float,
    max_bytes: int,
    workers: int,
    shard_bytes: int,
    on_error: str,
) -> None:
    check_field(seq_len >= 1, "seq_len", seq_len, "an integer >= 1")
    check_field(0 <= held_out_fraction < 1, "held_out_fraction", held_out_fraction, "a fraction in [0, 1)")
    check_field(max_bytes >= 0, "max_bytes", max_bytes, "an integer >= 0")
    column = reading.text_column
    check_field(column == "text" or not reading.chat, "text_column", column, "nothing with conversations")
    check_field(workers >= 0, "workers", workers, "an integer >= 0")
    check_field(shard_bytes >= 1, "shard_bytes", shard_bytes, "an integer >= 1")
    check_field(on_error in ("stop", "skip"), "on_error", on_error, "stop, skip")
    check_field(len(sources) > 0, "sources", list(sources), "files, folders, or stdlib")


def _check_same(manifest: Manifest, out: str, request: Manifest, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the folder `out` was prepared by another request."""
    check_tokenizer(manifest, out, tokenizer, "tokenizer")
    check_chat(manifest, out, request.chat is not None, None if request.chat is None else request.chat.template)
    names = ("seq_len", "sources", "held_out_fraction", "max_bytes", "text_column")
    check_request(manifest, out, {name: getattr(request, name) for name in names})


def check_tokenizer(manifest: Manifest, folder: str | Path, tokenizer: Tokenizer, name: str) -> None:
    """Raises ConfigError if `folder` was prepared with another tokenizer; `name` is what the user calls it."""
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        got = f"{tokenizer.name} (fingerprint {tokenizer.fingerprint[:12]})"
        allowed = f"{manifest.tokenizer} (fingerprint {manifest.tokenizer_fingerprint[:12]})"
        raise ConfigError(f"{name}: got {got}, allowed: {allowed}, {_remedy(folder)}")
    if tokenizer.end_of_document != manifest.end_of_document:
        field = f"{name.removesuffix('tokenizer')}end_of_document"
        got, allowed = f"token {tokenizer.end_of_document}", f"token {manifest.end_of_document}"
        raise ConfigError(f"{field}: got {got} of {tokenizer.name}, allowed: {allowed}, {_remedy(folder)}")


def check_chat(manifest: Manifest, folder: str | Path, chat: bool, template: str | None, prefix: str = "") -> None:
    """Raises ConfigError if `folder` does not hold conversations although it should, or the other way round, or holds
    them as another chat template writes them. template: its hash; None: whatever it is."""
    holds = manifest.chat is not None
    check_field(chat == holds, f"{prefix}chat", chat, f"{holds}, {_remedy(folder)}")
    if manifest.chat is not None and template not in (None, manifest.chat.template):
        got = f"another chat template (or other special tokens) than that {_remedy(folder)}"
        raise ConfigError(f"{prefix}chat_template: got {got}")


def check_request(manifest: Manifest, folder: str | Path, requested: Mapping[str, object], prefix: str = "") -> None:
    """Raises ConfigError if `folder` was prepared with other values; `prefix` precedes a field's name."""
    for name, value in requested.items():
        prepared_with = getattr(manifest, name)
        check_field(value == prepared_with, prefix + name, value, f"{prepared_with!r}, {_remedy(folder)}")


def _remedy(folder: str | Path) -> str:
    return f"with which {folder} was prepared (or delete that folder, or choose another)"


def with_inputs(manifest: Manifest, found: Found) -> Manifest:
    """A manifest that describes the current state of the files."""

    def digest(state: list[list[object]]) -> str:
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    files: Sequence[InputFile] = found.files
    return replace(
        manifest,
        skipped=found.skipped,
        left_out=tuple(found.left_out),
        inputs=digest([[file.name, file.location, file.size, file.modified] for file in files]),
        files=digest([[file.name, file.size] for file in files]),
        times=digest([[file.name, file.size, file.modified] for file in files]),
    )


def have_changed(manifest: Manifest, current: Manifest) -> bool:
    """Whether the names and sizes of the files show that the text is another one. With `max_bytes` they do not."""
    return bool(manifest.files) and manifest.files != current.files and not manifest.max_bytes


def _hash_request(request: Manifest, chats: ChatEncoder | None) -> str:
    """Identifies what the units in a work folder depend on, besides the text."""
    parts = [request.tokenizer_fingerprint, request.dtype, UNIT_BYTES, "units 3"]
    if chats is not None:
        # What was written on another day is not mixed with this if the template writes the date.
        day = date.today().isoformat() if chats.asks_the_time else ""
        parts += [chats.fingerprint, request.seq_len, request.end_of_document, day]
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _available_cores() -> int:
    # The affinity mask, where the system has one: a container may be limited to a few of the machine's cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_progress(units: Iterable[TokenUnit], stream: TextStream, progress: bool) -> Iterator[TokenUnit]:
    """Passes the units on, and shows how much text has been read."""
    file_bytes = sum(file.size for file in stream.inputs)
    expected_bytes = min(file_bytes, stream.max_bytes) if stream.max_bytes else file_bytes
    # Of compressed files the sizes say little about the text.
    is_compressed = any(file.suffix == ".parquet" or file.compression for file in stream.inputs)
    total = None if is_compressed else expected_bytes
    with Progress(total, "tokenizing", "B", show=progress) as bar:
        for unit in units:
            yield unit
            bar.update(int(unit.text_bytes.sum()))
