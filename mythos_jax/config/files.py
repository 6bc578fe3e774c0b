"""Configs as YAML files: those that people write, and those that runs store."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mythos_jax.config.run import Config
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.paths import to_path, write_whole
from mythos_jax.typed import from_dict, to_dict, upgrade
from mythos_jax.version import __version__

_WRITTEN_BY = "mythos_jax_version"
_FIRST_VERSION = "0.1.0"  # which stored configs without their version


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML config. overrides: command-line words, `--training.steps 100` or `--training.steps=100`.

    A file that `save_config` of an earlier version wrote is upgraded. Raises ConfigError: no such file, not YAML, an
    unknown key (with the nearest known one), a wrong type or value.
    """
    tree = read_yaml(path)
    tree.setdefault("name", Path(path).stem)
    if _WRITTEN_BY in tree:
        return _from_stored(tree, tree.pop(_WRITTEN_BY), overrides)
    apply_overrides(tree, overrides)
    return from_dict(Config, tree)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config.yaml of a run directory, also of a run that an earlier version made.

    Raises ConfigError as `load_config` does, with the version that wrote the file if it is another one.
    """
    tree = read_yaml(path)
    return _from_stored(tree, tree.pop(_WRITTEN_BY, _FIRST_VERSION), overrides)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML, with the version that wrote it."""
    tree = {_WRITTEN_BY: __version__, **to_dict(config)}
    write_whole(to_path(path), yaml.safe_dump(tree, sort_keys=False).encode())


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError when there is none."""
    try:
        tree = yaml.load(to_path(path).read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({one_line(error)})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, allowed: a mapping of sections")
    return tree


def apply_overrides(tree: dict[str, Any], words: Sequence[str]) -> None:
    """Writes command-line words, `--section.field value` or `--section.field=value`, into a tree, in place."""
    for key, value in _parse(words):
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: got a field inside {section!r}, which is not a section")
        node[name] = value


def _from_stored(tree: dict[str, Any], version: Any, overrides: Sequence[str]) -> Config:
    tree = upgrade(Config, tree)
    apply_overrides(tree, overrides)
    try:
        return from_dict(Config, tree)
    except ConfigError as error:
        if version == __version__:
            raise
        raise ConfigError(f"{error} (written by mythos_jax {version}, this is {__version__})") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML reads `3e-4` as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word}: got a stray word, allowed: --section.field value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{word}: got no value, allowed: {word} value")
            text = words.pop(0)
        try:
            yield key, yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise ConfigError(f"{word}: got {text!r}, allowed: a YAML value") from None
