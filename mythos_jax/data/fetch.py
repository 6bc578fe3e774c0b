"""Prepared rows in an object store: read where they are, or copied to the local disk first."""

import hashlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from mythos_jax.data.manifest import (
    MANIFEST_FILE,
    ROWS_AT_FILE,
    Manifest,
    check_files,
    file_sha256,
    load_manifest,
    parse_manifest,
)
from mythos_jax.data.storage import Part, Storage
from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote
from mythos_jax.streams import log

CACHE_VARIABLE = "MYTHOS_DATA_CACHE"
_PIECE = 32 << 20  # bytes that are copied at once


def local_folder(path: str | Path, copy: bool = False) -> Path:
    """A prepared folder on the local disk: `path` itself or, for gs://…, a folder that is made once per machine and
    kept. It has all files of `path` but those of the rows, and says where these are; or, with `copy`, these as well.
    Rows of version 1 are always copied.

    These folders are in $MYTHOS_DATA_CACHE (default: mythos-data in the system's temporary directory) under a name
    derived from the path and the manifest.
    Raises ConfigError: no prepared data at `path`, or not complete. StorageError: the storage does not answer.
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
        if not folder.exists() and (copy or manifest.version == 1):
            check_files(manifest, url, sizes)
            log(f"copying {url} to {folder}")
            _make(storage, sizes, folder, manifest)
        elif not folder.exists():
            check_files(manifest, url, sizes)
            if not window.exists():
                _make(storage, _without_rows(sizes, manifest), window, None)
            folder = window
    except OSError as error:
        raise ConfigError(f"{path}: cannot be copied to this machine ({error})") from None
    load_manifest(folder)
    return folder


def _digest(url: str, content: bytes) -> str:
    return hashlib.sha256(f"{url}\n".encode() + content).hexdigest()[:16]


def _sizes(storage: Storage) -> dict[str, int]:
    """Raises ConfigError if there is no manifest."""
    try:
        sizes = storage.sizes()
    except ConfigError:
        sizes = {}
    if MANIFEST_FILE not in sizes:
        raise ConfigError(
            f"{storage.folder}: nothing prepared there; allowed: a copy of a folder made by `mythos data prepare`"
        )
    return sizes


def _without_rows(sizes: dict[str, int], manifest: Manifest) -> dict[str, int]:
    rows = {name for split in manifest.splits for name in manifest.row_files(split)}
    return {name: size for name, size in sizes.items() if name not in rows}


def _make(storage: Storage, sizes: dict[str, int], folder: Path, manifest: Manifest | None) -> None:
    """Copies files to a temporary name first, so that `folder` is complete whenever it exists. manifest: of the rows
    that are among them; None: they are not, and the folder says where they are."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        for name, size in sizes.items():
            _copy(storage, name, size, partial / name)
        if manifest is None:
            (partial / ROWS_AT_FILE).write_text(f"{storage.folder}\n", encoding="utf-8")
        else:
            _check_copied(manifest, storage, partial)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) or not folder.exists():  # else another process was faster
            raise


def _copy(storage: Storage, name: str, size: int, target: Path) -> None:
    with target.open("wb") as file:
        for start in range(0, size, _PIECE):
            file.write(storage.read([Part(name, start, min(start + _PIECE, size))])[0])


def _check_copied(manifest: Manifest, storage: Storage, folder: Path) -> None:
    for split in manifest.splits:
        for name, sha256 in manifest.row_checksums(split).items():
            if file_sha256(folder / name) != sha256:
                raise ConfigError(f"{storage.folder}/{name}: its checksum differs from the manifest's; copy it again")
