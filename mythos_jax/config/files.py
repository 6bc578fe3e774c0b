"""Configs as YAML files: those that people write, and those that runs store."""

from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from mythos_jax.config.named import find_config
from mythos_jax.config.overrides import apply_overrides, expand_paths, override_names
from mythos_jax.config.run import Config, max_loops, mean_loops
from mythos_jax.config.yaml_tree import field_hint, read_yaml
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.paths import to_path, write_whole
from mythos_jax.typed import from_dict, to_dict, upgrade
from mythos_jax.version import __version__

_WRITTEN_BY = "mythos_jax_version"
_FIRST_VERSION = "0.1.0"  # which stored configs without their version


# Adds to the tree of a config the fields that it leaves open, and takes from the model that it starts from.
Inherit = Callable[[dict[str, Any]], None]


def load_config(source: str | Path, overrides: Sequence[str] = (), inherit: Inherit | None = None) -> Config:
    """Reads a YAML config: a file, or one of the package by its name, such as `quickstart` (see `find_config`).

    overrides: command-line words, `--training.steps 100` or `--training.steps=100`. `~` and environment variables in
    the paths of either are expanded. A file that `save_config` of an earlier version wrote is upgraded.
    inherit: called with the config's tree, before the fields that are not given get their defaults.

    Raises ConfigError: no such file, not YAML, an unknown key (with the nearest known one), a key given twice, a wrong
    type or value.
    """
    path = find_config(source)
    tree = expand_paths(read_yaml(path, Config), Config, "")
    tree.setdefault("name", Path(path).stem)
    if _WRITTEN_BY in tree:
        return _from_stored(tree, tree.pop(_WRITTEN_BY), overrides)
    in_file = _names(tree)
    apply_overrides(tree, overrides)
    if inherit is not None:
        inherit(tree)
    config = _checked_name(from_dict(Config, tree))
    _check_meant(config, in_file, overrides)
    return config


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config.yaml of a run directory, also of a run that an earlier version made.

    Raises ConfigError as `load_config` does, with the version that wrote the file if it is another one.
    """
    tree = read_yaml(path, Config)
    return _from_stored(tree, tree.pop(_WRITTEN_BY, _FIRST_VERSION), overrides)


def config_from_words(words: Sequence[str], **fields: Any) -> Config:
    """A config of defaults, command-line words and `fields`."""
    tree = dict(fields)
    apply_overrides(tree, words)
    return from_dict(Config, tree)


def sets_mesh(words: Sequence[str]) -> bool:
    """Whether command-line words say how the devices are divided."""
    return any(name.split(".")[0] == "mesh" for name in override_names(words))


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML, with the version that wrote it."""
    tree = {_WRITTEN_BY: __version__, **to_dict(config)}
    write_whole(to_path(path), yaml.safe_dump(tree, sort_keys=False).encode())


def _from_stored(tree: dict[str, Any], version: Any, overrides: Sequence[str]) -> Config:
    try:
        tree = upgrade(Config, tree)
        training = tree["training"]
        if version == _FIRST_VERSION and isinstance(training, dict) and isinstance(training.get("seed"), int):
            training["seed"] %= 2**32  # that version took any, and drew the weights from these bits of it
        apply_overrides(tree, overrides)
        return _checked_name(from_dict(Config, tree))
    except ConfigError as error:
        if version == __version__:
            raise
        raise ConfigError(f"{error} (written by mythos_jax {one_line(version)}, this is {__version__})") from None


def _checked_name(config: Config) -> Config:
    """The name is that of the run's directory in runs/, and of a pretrained model's report."""
    path = PurePath(config.name)
    inside = bool(path.name) and not path.is_absolute() and ".." not in path.parts
    config.check(inside, "name", "a name for a directory inside runs/")
    return config


def _check_meant(config: Config, in_file: set[str], overrides: Sequence[str]) -> None:
    """Refuses settings that are valid but cannot be meant: a mean depth above the largest, and a warm-up that the run
    is too short for, where it was asked for.

    A run that is cut short on the command line, to try a config, keeps the config's warm-up, and so can go on to the
    full length. `train` says so. Runs that exist are not refused.
    """
    mean = mean_loops(config)
    config.training.depth.check(max_loops(config) >= mean, "max_loops", f"at least the mean of the depth, {mean}")
    given = set(override_names(overrides))
    if "training.steps" not in given:
        given |= in_file
    problem = config.training.schedule_problem()
    if problem and given & {
        f"training.{name}" for name in ("warmup_steps", "decay_fraction", "depth.curriculum_steps")
    }:
        raise ConfigError(problem)


def _names(tree: Any, section: Any = Config, prefix: str = "") -> set[str]:
    """The dotted names of the fields in a tree."""
    if section is None or not isinstance(tree, dict):
        return set()
    below = [_names(value, field_hint(section, name), f"{prefix}{name}.") for name, value in tree.items()]
    return {f"{prefix}{name}" for name in tree}.union(*below)
