"""The configs that come with the package, by name."""

import errno
import os
from pathlib import Path
from typing import Any

from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote, to_path
from mythos_jax.typed import nearest_name

# In the repository a link to configs/, which is where they are edited; in a wheel a folder.
FOLDER = Path(__file__).parents[1] / "configs"


def config_names() -> list[str]:
    """The names of the package's configs: `quickstart`, `tasks/p_hop`, …"""
    files = [*FOLDER.glob("*.yaml"), *FOLDER.glob("*/*.yaml")]
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in files)


def named_config(source: str | os.PathLike) -> Path | None:
    """The package's config of this name; None if it has none, or if there is a file or folder of the name."""
    if os.path.exists(source) or str(source) not in config_names():
        return None
    return FOLDER / f"{source}.yaml"


def find_config(source: str | os.PathLike) -> Any:
    """The path of a config: `source` itself if it is there, else the package's config of that name.

    Raises ConfigError if there is neither, with the nearest name or all of them.
    """
    path = named_config(source)
    if path is not None:
        return path
    path = to_path(source)
    if is_remote(source) or os.path.exists(source) or path.suffix not in ("", ".yaml", ".yml"):
        return path  # for reading, whose error says what is wrong with it
    named = [name for name in config_names() if name == path.stem or name.endswith(f"/{path.stem}")]
    near = named[0] if named else nearest_name(str(path.with_suffix("")), config_names(), cutoff=0.6)
    if path.suffix:
        reason = f"cannot be read ({os.strerror(errno.ENOENT)})"
        raise ConfigError(f"{source}: {reason}" + (f"; did you mean the package's config {near}?" if near else ""))
    hint = f"did you mean {near}?" if near else f"allowed: a YAML file, or {', '.join(config_names())}"
    raise ConfigError(f"{source}: no such config; {hint}")
