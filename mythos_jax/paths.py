"""Paths on a disk or in an object store, such as `gs://bucket/runs/a`."""

import os
from pathlib import Path
from typing import Any


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names an object store: gs://, s3://, az://."""
    return "://" in str(path)


def to_path(path: str | os.PathLike) -> Any:
    """A `pathlib.Path`; for an object store an etils path, which has the same methods."""
    if not is_remote(path):
        return Path(path)
    from etils import epath

    return epath.Path(path)


def write_whole(path: Any, content: bytes) -> None:
    """Writes a file so that nobody ever sees half of it, and so that a failure leaves the old one as it was."""
    if is_remote(path):
        path.write_bytes(content)  # an object appears when it is complete
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def copy_tree(source: Any, target: Any) -> None:
    """Copies a folder's files and subfolders into another folder; either may be remote."""
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            copy_tree(item, target / item.name)
        else:
            (target / item.name).write_bytes(item.read_bytes())
