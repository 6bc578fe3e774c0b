"""Frozen dataclasses that check their own fields, with errors that a user can act on.

A config is a tree of `Section`s: frozen dataclasses whose fields carry their bounds in `Annotated`. They check
themselves, so a wrong value gives the same one-line message whether the config is built in Python, read from a file, or
overridden on the command line. The standard library is enough for this, and the model must need only jax and flax.
"""

import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union

from mythos_jax.bounds import Between, Formerly, Ge, Gt, OneOf, Or, Wide
from mythos_jax.errors import ConfigError, one_line

S = TypeVar("S", bound="Section")
M = TypeVar("M")
T = TypeVar("T")


class Section:
    """Base of the config dataclasses. It checks types and bounds, and refuses earlier names of fields.

    section: the dotted name of the section in YAML, given as a class argument; "" for the whole config.
    """

    section: ClassVar[str]

    def __init_subclass__(cls, section: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.section = section

    def __new__(cls, *_: Any, **fields: Any) -> Self:
        for name in fields:
            _check_not_renamed(cls, name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in annotated_hints(type(self)).items():
            check_value(getattr(self, name), hint, self.dotted(name))

    @classmethod
    def dotted(cls, name: str) -> str:
        """The name of a field as it is given on the command line, without the dashes."""
        return f"{cls.section}.{name}" if cls.section else name

    def check(self, ok: bool, name: str, allowed: str) -> None:
        """Raises ConfigError about the field `name` unless `ok`; for rules that concern more than one field."""
        check_field(ok, self.dotted(name), getattr(self, name), allowed)


def check_field(ok: bool, name: str, got: Any, allowed: str) -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(f"{name}: got {shown(got)}, allowed: {allowed}")


def check_value(value: Any, hint: Any, name: str) -> None:
    """Raises ConfigError unless a value is of an annotated type and within its bounds."""
    if not _is_a(value, hint):
        raise ConfigError(f"{name}: got {shown(value)}, allowed: {describe(hint)}")
    _check_bounds(value, hint, name)


def shown(value: Any) -> str:
    """A value in an error message: on one line, and shortened if it is large."""
    return _SHORT.repr(value)


class _AsInFiles(reprlib.Repr):
    """Tuples as the lists that they are in YAML."""

    def repr_tuple(self, x: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(x), level)


_SHORT = _AsInFiles()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 4, 200, 200, 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 16


def first_few(values: Sequence[int], limit: int = 12) -> str:
    """The first few values, for an error message."""
    return ", ".join(map(str, values[:limit])) + (", …" if len(values) > limit else "")


def nearest_name(name: str, names: Iterable[str], cutoff: float) -> str | None:
    """The name most similar to a misspelt one; None if none is at least `cutoff` (0 to 1) similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def marked(section: type, kind: type[M]) -> list[tuple[str, M]]:
    """The fields of a section that carry a marker of this class, each with the marker."""
    return [
        (name, marker)
        for name, hint in annotated_hints(section).items()
        for marker in getattr(hint, "__metadata__", ())
        if isinstance(marker, kind)
    ]


# Sections to nested dicts and back.


def to_dict(config: Any) -> dict[str, Any]:
    """A section as nested dicts, lists and scalars, as YAML and JSON have them."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value := getattr(config, f.name))
        else list(value)
        if isinstance(value, tuple)
        else value
        for f in dataclasses.fields(config)
    }


def from_dict(section: type[S], tree: Any) -> S:
    """Builds a section; raises ConfigError on an unknown key (with the nearest known one) or a bad value."""
    hints = _hints(section)
    if not isinstance(tree, dict):
        raise ConfigError(f"{section.section or 'config'}: got {tree!r}, allowed: a mapping with {', '.join(hints)}")
    values = {}
    for key, value in tree.items():
        if key not in hints:
            _check_not_renamed(section, key)
            near = nearest_name(str(key), hints, cutoff=0.5)
            hint = f"did you mean {section.dotted(near)}?" if near else f"allowed: {', '.join(hints)}"
            raise ConfigError(f"{one_line(section.dotted(key))}: unknown key; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = from_dict(hints[key], {} if value is None else value)
        else:
            values[key] = convert(value, hints[key])
    return section(**values)


def convert(value: Any, hint: Any) -> Any:
    """A value of YAML, JSON or the command line as a field of this type holds it: a list as a tuple, 1 as 1.0, and 1e3
    as 1000. A value of another type stays as it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return convert(value, arguments[0])
    if origin in _UNIONS:
        return value if value is None else convert(value, arguments[0])
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, arguments[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: convert(item, arguments[1]) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if -_MAX_FLOAT <= value <= _MAX_FLOAT else math.inf
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def text_is_wanted(hint: Any, value: str) -> bool:
    """Whether a field of this type takes `value`, as it is written, as its text."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return text_is_wanted(arguments[0], value)
    if origin in _UNIONS:
        return value != "null" and any(text_is_wanted(argument, value) for argument in arguments)
    return hint is str or origin is Literal


def upgrade(section: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """A section that an earlier version stored with `to_dict`, with current names and with defaults for new fields.

    The default of a field that is added must therefore mean what the code did before.
    """
    hints, current = _hints(section), to_dict(section())
    upgraded = current | {_renamed(section).get(name, (name, ""))[0]: value for name, value in tree.items()}
    for name, value in upgraded.items():
        if dataclasses.is_dataclass(hints.get(name)) and isinstance(value, dict):
            upgraded[name] = upgrade(hints[name], value)
    return upgraded


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves in which two nested dicts differ: both values by dotted name."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return {} if old == new else {name: (old, new)}
    changed: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        dotted = f"{name}.{key}" if name else key
        changed |= differences(old.get(key), new.get(key), dotted)
    return changed


# Type hints.


def _cached(function: Callable[[type], T]) -> Callable[[type], T]:
    """`functools.cache`, declared as a plain function: type checkers do not see that classes can be hashed."""
    return functools.cache(function)


@_cached
def _hints(section: type) -> dict[str, Any]:
    """The type of each field, without its markers."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@_cached
def annotated_hints(section: type) -> dict[str, Any]:
    """The type of each field, with its markers."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in _hints(section)}


@_cached
def _renamed(section: type) -> dict[str, tuple[str, str]]:
    """For each earlier name of a field, the current one and the note about it."""
    return {marker.name: (name, marker.note) for name, marker in marked(section, Formerly)}


def _check_not_renamed(section: type[Section], name: str) -> None:
    if name in _renamed(section):
        new, note = _renamed(section)[name]
        raise ConfigError(f"{section.dotted(name)}: renamed to {section.dotted(new)}{f' ({note})' if note else ''}")


def describe(hint: Any, plural: bool = False) -> str:
    """What an annotated type allows, in words: "an integer >= 1", "gqa, mla", "a list of integers >= 1"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        words = describe(arguments[0], plural)
        for marker in arguments[1:]:
            if isinstance(marker, Ge | Gt | Between | OneOf):
                words = marker.describe(words)
            elif isinstance(marker, Or):
                words += f", or {marker.value} {marker.meaning}"
        return words
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {describe(arguments[0], plural=True)}"
    if origin is dict:
        return f"a mapping from {describe(arguments[0])} to {describe(arguments[1])}"
    if origin in _UNIONS:
        bounded = any(typing.get_origin(argument) is Annotated for argument in arguments)
        return (", or " if bounded else " or ").join(describe(argument) for argument in arguments)
    singular, many = _WORDS.get(hint, (str(hint), str(hint)))
    return many if plural else singular


_UNIONS = (types.UnionType, Union)
_MAX_INT, _MAX_FLOAT = 2**31 - 1, 2**1023
_WORDS: dict[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    type(None): ("null", "null"),
}


def _check_bounds(value: Any, hint: Any, name: str, allowed: str = "") -> None:
    """Raises ConfigError if a value, which has the right type, is out of the bounds in its annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        _check_bounds(value, arguments[0], name)
        bounds = [marker for marker in arguments[1:] if isinstance(marker, Ge | Gt | Between | OneOf)]
        exceptions = [marker.value for marker in arguments[1:] if isinstance(marker, Or)]
        ok = value in exceptions or all(bound.allows(value) for bound in bounds)
        check_field(ok, name, value, allowed or describe(hint))
        if arguments[0] is int and not any(isinstance(marker, Wide | Between) for marker in arguments[1:]):
            check_field(value <= _MAX_INT, name, value, f"at most {_MAX_INT}")
    elif origin is tuple:
        for item in value:
            _check_bounds(item, arguments[0], name, describe(arguments[0], plural=True))
    elif origin is dict:
        for key, item in value.items():
            _check_bounds(item, arguments[1], f"{name} {key}")
    elif origin in _UNIONS and value is not None:
        for argument in arguments:
            if argument is not type(None):
                _check_bounds(value, argument, name, describe(hint))


def _is_a(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _is_a(value, arguments[0])
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_a(k, arguments[0]) and _is_a(v, arguments[1]) for k, v in value.items()
        )
    if origin in _UNIONS:
        return any(_is_a(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and "\0" not in value  # no path has one
    return isinstance(value, hint)
