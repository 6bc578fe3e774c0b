"""Prepared rows that lie in an object store, brought to this machine's disk: rows are read at random, from files."""

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

CACHE = "MYTHOS_DATA_CACHE"


def local_folder(path: str | Path) -> Path:
    """A prepared folder on this disk: `path` itself, or of gs://… a copy, made once a machine and kept.

    Copies lie in $MYTHOS_DATA_CACHE (default: mythos-data in the system's temporary directory), named by place and
    content. Raises ConfigError where nothing prepared is there, or it cannot be read.
    """
    if not is_remote(path):
        return Path(path)
    source = to_path(path)
    try:
        if not (source / MANIFEST_FILE).exists():
            raise ConfigError(
                f"{path}: nothing prepared there; allowed: what `mythos data prepare` made on a disk, copied there"
            )
        content = hashlib.sha256(f"{path}\n".encode() + (source / MANIFEST_FILE).read_bytes()).hexdigest()[:16]
        root = Path(os.environ.get(CACHE) or Path(tempfile.gettempdir()) / "mythos-data")
        folder = root / f"{source.name}-{content}"
        if not folder.exists():
            print(f"copying {path} to {folder}", file=sys.stderr)
            beside = root / f"{folder.name}.{uuid.uuid4().hex[:8]}"
            copy_tree(source, beside)
            try:
                beside.rename(folder)
            except OSError:  # another process of this machine was first
                shutil.rmtree(beside)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be copied to this machine ({error})") from None
    load_manifest(folder)
    return folder
