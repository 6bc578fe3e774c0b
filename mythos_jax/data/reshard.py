"""Writes the rows of a prepared folder again, in files of another size, without the text or its tokenizer."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from mythos_jax.data.destination import Destination
from mythos_jax.data.fetch import SMALL_FILES, local_folder
from mythos_jax.data.manifest import MANIFEST_FILE, VERSION, Manifest, Split, load_manifest
from mythos_jax.data.row_file import RowFile
from mythos_jax.data.stored_rows import all_rows, open_stored_rows
from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote
from mythos_jax.progress import Progress


def reshard(source: str | Path, out: str | Path, shard_bytes: int, *, progress: bool = True) -> Manifest:
    """Writes the rows of `source`, a prepared folder (also of version 1, also in an object store), into the new folder
    `out`, in files of about `shard_bytes`. They are the same data: a run goes on with either.

    Raises ConfigError: no prepared folder, damaged rows, `out` exists or cannot be written. StorageError: the store
    does not answer.
    """
    if is_remote(out):
        raise ConfigError(f"{out}: rows are written on a disk; allowed: a local folder, which you then copy there")
    folder = local_folder(source)
    manifest = load_manifest(folder)
    place = Destination(out, f"shard-{manifest.fingerprint[:12]}")
    if place.existing() is not None:
        raise ConfigError(f"{out}: already holds prepared data; allowed: a new folder")
    try:
        with place.working() as (_, name):
            rows = Path(name)
            shutil.rmtree(rows, ignore_errors=True)
            rows.mkdir()
            splits = _write(folder, manifest, rows, shard_bytes, progress)
            for split, found in splits.items():
                if found.content != manifest.splits[split].content:
                    raise ConfigError(f"{source}: the rows of {split} are not those that its manifest was made with")
            for file in SMALL_FILES:
                if file != MANIFEST_FILE and (folder / file).exists():
                    shutil.copyfile(folder / file, rows / file)
            return place.publish(name, replace(manifest, version=VERSION, splits=splits))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error})") from None


def _write(folder: Path, manifest: Manifest, rows: Path, shard_bytes: int, progress: bool) -> dict[str, Split]:
    splits = {}
    count = sum(split.rows for split in manifest.splits.values())
    with Progress(count, "writing", "row", show=progress) as bar:
        for name, split in manifest.splits.items():
            writer = RowFile(rows, name, _row_bytes(manifest), shard_bytes)
            try:
                for row in all_rows(open_stored_rows(folder, name, manifest), split.rows):
                    writer.write(row)
                    bar.update()
                splits[name] = Split(**vars(split) | writer.finish())
            except BaseException:
                writer.abandon()
                raise
    return splits


def _row_bytes(manifest: Manifest) -> int:
    """Of the longest row; of conversations it also has weights and numbers of samples."""
    per_token = np.dtype(manifest.dtype).itemsize + (8 if manifest.chat is not None else 0)
    return (manifest.seq_len + 1) * per_token
