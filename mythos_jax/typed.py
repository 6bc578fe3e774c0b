"""From YAML to frozen dataclasses and back, with errors a user can act on.

Small on purpose, and our own: a dataclass that checks itself gives the same one-line message whether it is built
in Python, read from a file, or overridden on the command line.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from mythos_jax.errors import ConfigError
from mythos_jax.paths import to_path


@dataclasses.dataclass(frozen=True)
class Formerly:
    """Marks a field, inside `Annotated`, with a name it had in an earlier version, and what to know about the new one.

    Giving the earlier name is an error that names the new one; what a program stored is upgraded (see `upgrade`).
    """

    name: str
    note: str = ""


class Section:
    """Base of the config dataclasses. It refuses earlier names of fields; `section` is its dotted name in the YAML."""

    section: ClassVar[str]

    def __init_subclass__(cls, section: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.section = section

    def __new__(cls, *_: Any, **fields: Any) -> Self:
        for name in fields:
            _check_not_renamed(cls, name)
        return super().__new__(cls)


def check_field(ok: bool, name: str, got: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}: got {got!r}, allowed: {allowed}")


def first_few(values: Sequence[int], limit: int = 12) -> str:
    """The first few values, for an error message."""
    return ", ".join(map(str, values[:limit])) + (", …" if len(values) > limit else "")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError when there is none."""
    path = to_path(path)
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, allowed: a mapping of sections")
    return tree


def apply_overrides(tree: dict[str, Any], words: Sequence[str]) -> None:
    """Lays command-line words, `--section.field value` or `--section.field=value`, over a tree, in place."""
    for key, value in _parse(words):
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: got a field inside {section!r}, which is no section")
        node[name] = value


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain containers; tuples become lists."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value := getattr(config, f.name))
        else list(value)
        if isinstance(value, tuple)
        else value
        for f in dataclasses.fields(config)
    }


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the leaves in which two trees of plain containers differ, with both values."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return {} if old == new else {name: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        dotted = f"{name}.{key}" if name else key
        found |= differences(old.get(key), new.get(key), dotted)
    return found


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


def _fields(kind: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))


def from_dict(kind: type, tree: Any, prefix: str = "") -> Any:
    """Builds a config dataclass; raises ConfigError on an unknown key (with the nearest known one) or a bad value."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix or 'config'}: got {tree!r}, allowed: a mapping with {_fields(kind)}")
    hints = _hints(kind)
    dotted = f"{prefix}." if prefix else ""
    values = {}
    for key, value in tree.items():
        if key not in hints:
            _check_not_renamed(kind, key)
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {dotted}{near[0]}?" if near else f"allowed: {_fields(kind)}"
            raise ConfigError(f"{dotted}{key}: unknown key; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = from_dict(hints[key], {} if value is None else value, f"{dotted}{key}")
        elif isinstance(value, list):
            values[key] = tuple(value)
        elif hints[key] in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
            values[key] = float(value)
        else:
            values[key] = value
    return kind(**values)


def upgrade(kind: type, tree: dict[str, Any]) -> dict[str, Any]:
    """What an earlier version stored of a config dataclass, with the names of this one and its defaults for new fields.

    A field that is added must therefore have a default that means what the code did before.
    """
    hints, current = _hints(kind), to_dict(kind())
    upgraded = current | {_renamed(kind).get(name, (name, ""))[0]: value for name, value in tree.items()}
    for name, value in upgraded.items():
        if dataclasses.is_dataclass(hints.get(name)) and isinstance(value, dict):
            upgraded[name] = upgrade(hints[name], value)
    return upgraded


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The type of each field, without its markers."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def _renamed(kind: type) -> dict[str, tuple[str, str]]:
    """The field that each earlier name now stands for, and what changed in its meaning."""
    return {
        marker.name: (name, marker.note)
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
        for marker in getattr(hint, "__metadata__", ())
        if isinstance(marker, Formerly)
    }


def _check_not_renamed(kind: type[Section], name: str) -> None:
    if name in _renamed(kind):
        new, note = _renamed(kind)[name]
        dotted = f"{kind.section}." if kind.section else ""
        raise ConfigError(f"{dotted}{name}: renamed to {dotted}{new}{f' ({note})' if note else ''}")


def check_types(config: Any, section: str) -> None:
    """Raises ConfigError where a field's value is not of its declared type."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not _is_a(value, hint):
            raise ConfigError(f"{section}{'.' if section else ''}{name}: got {value!r}, allowed: {_describe(hint)}")


def _is_a(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_a(k, arguments[0]) and _is_a(v, arguments[1]) for k, v in value.items()
        )
    if origin is types.UnionType:
        return any(_is_a(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {_describe(arguments[0]).removeprefix('an ').removeprefix('a ')}s"
    if origin is dict:
        return f"a mapping from {_describe(arguments[0])} to {_describe(arguments[1])}"
    if origin is types.UnionType:
        return " or ".join(_describe(argument) for argument in arguments)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, str(hint))
