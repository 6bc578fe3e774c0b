"""Paths on a disk or in an object store, such as `gs://bucket/runs/a`."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mythos_jax.errors import ConfigError
from mythos_jax.json_text import parse_json


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
    with new_file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write a file on a disk, which gets its name after the block; nothing stays if that raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError:  # such as a full disk
        temporary.unlink(missing_ok=True)
        raise


def read_if_there(path: Any) -> bytes | None:
    """The content of a file; None if there is none."""
    try:
        content: bytes = path.read_bytes()
    except FileNotFoundError:
        return None
    return content


def expand(path: str) -> str:
    """A path as a user gives it, on the command line or in a config, with `~`, `~NAME`, `$NAME` and `${NAME}` replaced.

    Raises ConfigError if there is no such user or environment variable; an empty variable counts as none.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ConfigError(f"{path}: the environment variable {name} is not set")
        return os.environ[name]

    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise ConfigError(f"{path}: there is no user {home[1:].split('/')[0]!r}, allowed for such a name: ./{home}")
    # The home directory is a path already, in which a dollar sign is just that.
    start = len(home) - len(path.partition("/")[2]) if path.startswith("~") else 0
    return home[:start] + re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, home[start:])


def copy_tree(source: Any, target: Any) -> None:
    """Copies a folder's files and subfolders into another folder; either may be remote."""
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            copy_tree(item, target / item.name)
        else:
            (target / item.name).write_bytes(item.read_bytes())


def is_lfs_pointer(path: Any) -> bool:
    """Whether this is what git leaves instead of a large file that was not downloaded. False if it cannot be read."""
    start = b"version https://git-lfs.github.com/spec/"
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def read_json(path: Any) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError."""
    if is_lfs_pointer(path):
        raise ConfigError(f"{path}: is a Git LFS pointer, not JSON; run `git lfs pull` in its repository")
    try:
        tree = parse_json(path.read_bytes(), unique_keys=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, allowed: an object with fields")
    return tree
