"""Prepares text on many machines: the same rows, to the bit, as prepare.py makes on one.

The command itself plans, waits, and writes the manifest. Everything else is done by workers (part_worker.py), as a
pipeline of Apache Beam (beam_pipeline.py). All of them share a work folder, OUT.partial-HASH: in an object store, or on
a disk that all see. A pipeline that was stopped goes on from what is in it, and so does a command without a runner.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_jax.data.manifest import SPLITS, shards_sha256
from mythos_jax.data.part_worker import (
    Job,
    content_file,
    part_file,
    part_key,
    plan,
    shard_file,
    split_shards,
    stored_result,
    unit_counts,
)
from mythos_jax.data.shard_plan import finish_split
from mythos_jax.data.text_parts import TextPart, TextStream, text_bytes
from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.data.work_files import WorkFiles
from mythos_jax.data.write_rows import Written, write_rows
from mythos_jax.errors import ConfigError, StorageError, one_line
from mythos_jax.paths import is_remote
from mythos_jax.streams import counted, log

_READ_AT_ONCE = 32  # results


@dataclass(frozen=True)
class Runner:
    """Where a pipeline runs. name: of a runner of Beam. flags: its own. workers: processes of the direct runner."""

    name: str
    flags: tuple[str, ...]
    workers: int


def check_runner(runner: Runner, sources: Sequence[str], out: str | Path) -> None:
    """Raises ConfigError: no Beam, no such runner or flag, or workers that cannot see the files."""
    logging.disable(logging.WARNING)  # Beam says at once what it lacks for services that may not be used
    try:
        from mythos_jax.data.beam_pipeline import check
    except ImportError as error:
        package = "pip install 'mythos-jax[beam]'"
        raise ConfigError(f"--runner: Apache Beam cannot be imported ({one_line(error)}); {package}") from None
    finally:
        logging.disable(logging.NOTSET)
    check(runner.name, runner.flags)
    if runner.name == "DataflowRunner":
        for place in (*sources, str(out)):
            if not is_remote(place):
                raise ConfigError(f"{place}: workers of Dataflow cannot see it; allowed: gs://…, hf://… and other URLs")


def write_on_workers(stream: TextStream, job: Job, runner: Runner, encoder: Tokenizer) -> Written:
    """Writes the rows into the folder of the job. Raises as `prepare` does."""
    from mythos_jax.data.beam_pipeline import run

    parts = _parts(stream)
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(folder)
        job.files.below("tokenizer").put_all(Path(folder))
    log(f"{runner.name}: {counted(len(parts), 'part')} of {counted(len(stream.inputs), 'file')}; work in {job.work}")
    run(parts, job, runner.name, runner.flags, runner.workers)
    results = _read(job, {part_file(part.number): part_key(part, job.request) for part in parts})
    return _collect(job, results) if job.conventions is None else _pack(job, results)


def _parts(stream: TextStream) -> list[TextPart]:
    """The parts of the stream. With `max_bytes`, text is read up to there, to see where it is."""
    parts: list[TextPart] = []
    before = 0
    for number, inputs in enumerate(stream.groups()):
        part = stream.part(number, inputs, before)
        if part is None:
            break
        parts.append(part)
        before += text_bytes(part) if stream.max_bytes else 0
    return parts


def _collect(job: Job, results: list[dict[str, Any]]) -> Written:
    """What the workers have written."""
    planned = plan(results, job)
    shards = _read(job, {shard_file(shard): shard.key(job.request) for shard in planned.shards})
    written = planned.written
    for split in SPLITS:
        own = split_shards(split, shards)
        content = _read(job, {content_file(split): shards_sha256(own)})[0]["content"]
        written.splits[split] = finish_split(written.splits[split], own, content, job.request)
    return written


def _pack(job: Job, results: list[dict[str, Any]]) -> Written:
    """Packs the rows of conversations here, because they depend on all that came before."""
    counts = [count for count in unit_counts(results) if count.documents or count.left_out]
    with tempfile.TemporaryDirectory(dir=job.scratch) as name:
        units = lambda: (job.load(count.part, count.number) for count in counts)  # noqa: E731
        written = write_rows(units, Path(name) / "rows", job.request, job.shard_bytes)
        WorkFiles(job.rows).put_all(Path(name) / "rows")
    return written


def _read(job: Job, keys: Mapping[str, str]) -> list[dict[str, Any]]:
    """The results in these files, by their keys. Raises the error that is the result of the first that has one, and
    says the rest."""
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        stored = list(pool.map(lambda name: stored_result(job, name, keys[name]), keys))
    names_and_trees = zip(keys, stored, strict=True)
    trees = [tree or {"error": f"{name}: no result", "kind": "OSError"} for name, tree in names_and_trees]
    errors = [tree for tree in trees if "error" in tree]
    for tree in errors[1:10]:
        log(f"also: {tree['error']}")
    if errors:
        log(f"the finished work is kept in {job.work}; the same command goes on from there")
        kinds = {"ConfigError": ConfigError, "StorageError": StorageError}
        raise kinds.get(errors[0]["kind"], OSError)(errors[0]["error"])
    return trees
