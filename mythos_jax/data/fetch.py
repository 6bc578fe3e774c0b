"""Prepared rows in an object store: read where they are, or copied to the local disk first."""

import hashlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from mythos_jax.data.conventions import GENERATION_FILE, SETTINGS_FILE
from mythos_jax.data.manifest import (
    MANIFEST_FILE,
    ROWS_AT_FILE,
    Manifest,
    check_files,
    check_sums,
    load_manifest,
    parse_manifest,
)
from mythos_jax.data.storage import MissingError, Part, Storage
from mythos_jax.data.tokenizer import TOKENIZER_FILE
from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote
from mythos_jax.processes import process_prefix
from mythos_jax.streams import log

CACHE_VARIABLE = "MYTHOS_DATA_CACHE"
SMALL_FILES = (MANIFEST_FILE, TOKENIZER_FILE, SETTINGS_FILE, GENERATION_FILE)  # what `prepare` writes besides rows
_PIECE = 32 << 20  # bytes that are copied at once


def local_folder(path: str | Path, copy: bool = False) -> Path:
    """A prepared folder on the local disk: `path` itself or, for gs://…, a folder that is made once per machine and
    kept. It has the manifest and what belongs to the tokenizer, and says where the rows are; or, with `copy`, it has
    these as well. Rows of version 1 are always copied. Nothing else that is at `path` is looked at.

    These folders are in $MYTHOS_DATA_CACHE (default: mythos-data in the system's temporary directory) under a name
    derived from the path and the manifest.
    Raises ConfigError: no prepared data at `path`, not complete, or may not be read. StorageError: the storage does
    not answer.
    """
    if not is_remote(path):
        return Path(path)
    url, storage = str(path).rstrip("/"), Storage(str(path).rstrip("/"))
    sizes = _sizes(storage)
    content = storage.read([Part(MANIFEST_FILE, 0, sizes[MANIFEST_FILE])], opening=True)[0]
    manifest = parse_manifest(lambda: content, f"{url}/{MANIFEST_FILE}")
    root = Path(os.environ.get(CACHE_VARIABLE) or Path(tempfile.gettempdir()) / "mythos-data")
    name = f"{url.rpartition('/')[2]}-{_digest(url, content)}"
    folder, window = root / name, root / f"{name}-elsewhere"
    try:
        if not folder.exists():
            check_files(manifest, url, sizes)
            if copy or manifest.version == 1:
                log(f"{process_prefix()}copying {url} to {folder}")
                _make(storage, sizes, folder, manifest, copy=True)
            else:
                if not window.exists():
                    _make(storage, sizes, window, manifest, copy=False)
                folder = window
    except OSError as error:
        raise ConfigError(f"{path}: cannot be copied to this machine ({error})") from None
    load_manifest(folder)
    return folder


def _digest(url: str, content: bytes) -> str:
    return hashlib.sha256(f"{url}\n".encode() + content).hexdigest()[:16]


def _sizes(storage: Storage) -> dict[str, int]:
    """Raises ConfigError if there is no manifest, or the folder may not be read."""
    try:
        sizes = storage.sizes()
    except MissingError:
        sizes = {}
    if MANIFEST_FILE not in sizes:
        raise ConfigError(
            f"{storage.folder}: nothing prepared there; allowed: a copy of a folder made by `mythos data prepare`"
        )
    return sizes


def _make(storage: Storage, sizes: dict[str, int], folder: Path, manifest: Manifest, copy: bool) -> None:
    """Copies files to a temporary name first, so that `folder` is complete whenever it exists. copy: the rows as well;
    else the folder says where they are."""
    rows = [name for split in manifest.splits for name in manifest.row_files(split)] if copy else []
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        for name in (*(name for name in SMALL_FILES if name in sizes), *rows):
            _copy(storage, name, sizes[name], partial / name)
        if copy:
            check_sums(manifest, partial, storage.folder)
        else:
            (partial / ROWS_AT_FILE).write_text(f"{storage.folder}\n", encoding="utf-8")
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) or not folder.exists():  # else another process was faster
            raise


def _copy(storage: Storage, name: str, size: int, target: Path) -> None:
    with target.open("wb") as file:
        for start in range(0, size, _PIECE):
            file.write(storage.read([Part(name, start, min(start + _PIECE, size))])[0])
