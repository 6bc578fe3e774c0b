"""Reading YAML: YAML 1.2's numbers, no key twice, and text as it is written where a field is text."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin

import yaml

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.paths import to_path
from mythos_jax.typed import Section, annotated_hints, text_is_wanted

_TAG = "tag:yaml.org,2002:"
# What PyYAML raises: its own errors, those of Python's constructors (`!!int x`), and that of 1,000 nested brackets.
_UNREADABLE = (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError)


def read_yaml(path: str | Path, section: type[Section] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file. section: the type of config that it holds; it says which values are text.

    Raises ConfigError: cannot be read, not YAML, no mapping, a key given twice.
    """
    try:
        text = to_path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a YAML file ({one_line(error)})") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    try:
        tree = parse_yaml(text, section)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, allowed: a mapping of sections")
    return tree


def parse_yaml(text: str, hint: Any = None) -> Any:
    """The value of a YAML text. hint: the type that it is for. Raises ConfigError: not YAML, a key given twice."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _prepare(node, hint, "", set())
        return loader.construct_document(node)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error, limit=300)
        raise ConfigError(f"not a YAML file ({reason})") from None


def _prepare(node: yaml.Node, hint: Any, name: str, seen: set[tuple[int, int]]) -> None:
    """Marks what is text as text, in place, and refuses a mapping that has a key twice. name: dotted, of the node."""
    if (id(node), id(hint)) in seen:  # an alias, which may also be of a node around it
        return
    seen.add((id(node), id(hint)))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            merged = key.tag == f"{_TAG}merge"
            if isinstance(key, yaml.ScalarNode) and not merged:
                key.tag = f"{_TAG}str"
            word = key.value if isinstance(key.value, str) else "?"
            dotted = f"{name}.{word}" if name else word
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and word in lines:
                where = f"line {line}" if lines[word] == line else f"lines {lines[word]} and {line}"
                raise ConfigError(f"{one_line(dotted)}: given twice, on {where}")
            lines[word] = line
            _prepare(value, hint if merged else field_hint(hint, word), name if merged else dotted, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _prepare(item, item_hint(hint), name, seen)
    elif node.style is None and node.tag != f"{_TAG}null" and text_is_wanted(hint, node.value):
        node.tag = f"{_TAG}str"


def field_hint(hint: Any, name: str) -> Any:
    """The annotated type of what a section or a dict holds under a name; None if nothing is known about it."""
    hint = _bare(hint)
    if isinstance(hint, type) and issubclass(hint, Section):
        return annotated_hints(hint).get(name)
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    return None


def item_hint(hint: Any) -> Any:
    """The annotated type of the items of a list; None if nothing is known about them."""
    hint = _bare(hint)
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _bare(hint: Any) -> Any:
    """A type without its markers."""
    return _bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1: `3e-4` is text there, `010` is 8, `1:30` is 90, and `2024-11-01` is a date."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))


_SIGN_OR_DIGIT = "-+0123456789"
for kind, pattern, first in [
    ("int", r"[-+]?[0-9][0-9_]*", _SIGN_OR_DIGIT),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        _SIGN_OR_DIGIT + ".",
    ),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
]:
    _Loader.add_implicit_resolver(f"{_TAG}{kind}", re.compile(f"(?:{pattern})$"), list(first))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_integer)
