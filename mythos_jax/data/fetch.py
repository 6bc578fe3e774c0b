"""Copies prepared rows from an object store to the local disk, because training reads rows at random."""

import hashlib
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

from mythos_jax.data.manifest import MANIFEST_FILE, load_manifest
from mythos_jax.errors import ConfigError
from mythos_jax.paths import copy_tree, is_remote, to_path

CACHE_VARIABLE = "MYTHOS_DATA_CACHE"


def local_folder(path: str | Path) -> Path:
    """A prepared folder on the local disk: `path` itself or, for gs://…, a copy made once per machine and kept.

    Copies are stored in $MYTHOS_DATA_CACHE (default: mythos-data in the system's temporary directory) under a name
    derived from the path and the manifest. Raises ConfigError: no prepared data at `path`, or it cannot be copied.
    """
    if not is_remote(path):
        return Path(path)
    source = to_path(path)
    try:
        if not (source / MANIFEST_FILE).exists():
            raise ConfigError(
                f"{path}: nothing prepared there; allowed: a copy of a folder made by `mythos data prepare`"
            )
        content = hashlib.sha256(f"{path}\n".encode() + (source / MANIFEST_FILE).read_bytes()).hexdigest()[:16]
        root = Path(os.environ.get(CACHE_VARIABLE) or Path(tempfile.gettempdir()) / "mythos-data")
        folder = root / f"{source.name}-{content}"
        if not folder.exists():
            print(f"copying {path} to {folder}", file=sys.stderr)
            _copy(source, folder)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be copied to this machine ({error})") from None
    load_manifest(folder)
    return folder


def _copy(source: Path, folder: Path) -> None:
    """Copies to a temporary name first, so that `folder` is complete whenever it exists."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        copy_tree(source, partial)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():  # otherwise another process of this machine has copied it meanwhile
            raise
