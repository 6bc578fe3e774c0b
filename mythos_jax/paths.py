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


def copy_tree(source: Any, target: Any) -> None:
    """Copies a folder's files and subfolders into another folder; either may be remote."""
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            copy_tree(item, target / item.name)
        else:
            (target / item.name).write_bytes(item.read_bytes())
