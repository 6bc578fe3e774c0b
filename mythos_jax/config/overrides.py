"""Config fields on the command line: `--section.field value` or `--section.field=value`.

The type of a field decides how its value is read. Text is taken as it is, whatever characters it has; anything else is
YAML: `3e-4`, `true`, `null`, `[1, 2]`, `{data/web: 0.7, "data/set #2": 0.3}`. A list of one needs no brackets:
`--data.sources texts`. Of a field that is given twice, the last value counts.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

from mythos_jax.bounds import IsPath
from mythos_jax.config.run import Config
from mythos_jax.config.yaml_tree import field_hint, parse_yaml
from mythos_jax.errors import ConfigError
from mythos_jax.paths import expand
from mythos_jax.typed import Section, annotated_hints, convert, describe, from_dict, shown, text_is_wanted


def apply_overrides(tree: dict[str, Any], words: Sequence[str]) -> None:
    """Writes command-line words into a config's tree, in place. A mapping adds to a section: its other fields stay."""
    for key, text in _pairs(words):
        hint: Any = Config
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            hint = field_hint(hint, section)
            if node.get(section) is None:  # also a section that is empty in the file
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: got a field inside {section!r}, which is not a section")
        hint = field_hint(hint, name)
        _write(node, name, expand_paths(parse_value(text, hint, f"--{key}"), hint, key), hint)


def override_names(words: Sequence[str]) -> list[str]:
    """The dotted names of the fields that command-line words set; of the fields in a mapping, too."""
    names = []
    for key, text in _pairs(words):
        names.append(key)
        hint: Any = Config
        for name in key.split("."):
            hint = field_hint(hint, name)
        if isinstance(hint, type) and issubclass(hint, Section):
            names += [f"{key}.{name}" for name in parse_value(text, hint, key)]
    return names


def parse_value(text: str, hint: Any, name: str) -> Any:
    """A word of the command line as a value of this (annotated) type. Raises ConfigError if it is not YAML either."""
    if text_is_wanted(hint, text):
        return text
    if get_origin(hint) is tuple and text and not text.lstrip().startswith("["):
        return (parse_value(text, get_args(hint)[0], name),)
    try:
        return convert(parse_yaml(text, hint), hint)
    except ConfigError as error:
        if "given twice" in str(error):
            raise ConfigError(f"{name}: {error}") from None
        allowed = describe(hint) if hint is not None else "a YAML value"
        raise ConfigError(f"{name}: got {shown(text)}, allowed: {allowed}") from None


def expand_paths(value: Any, hint: Any, name: str) -> Any:
    """The value with `~` and environment variables replaced in its paths."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated and not any(isinstance(argument, IsPath) for argument in arguments):
        return expand_paths(value, arguments[0], name)
    if isinstance(hint, type) and issubclass(hint, Section) and isinstance(value, dict):
        dots = f"{name}." if name else ""
        hints = annotated_hints(hint)
        return {key: expand_paths(item, hints.get(key), f"{dots}{key}") for key, item in value.items()}
    if origin is Annotated and isinstance(value, str):
        try:
            return expand(value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    if origin is tuple and isinstance(value, list | tuple):
        return [expand_paths(item, arguments[0], name) for item in value]
    if origin is dict and isinstance(value, dict):
        expanded = {expand_paths(key, arguments[0], name): item for key, item in value.items()}
        if len(expanded) < len(value):
            raise ConfigError(f"{name}: got {shown(value)}, in which two paths are the same")
        return expanded
    return value


def _write(node: dict[str, Any], name: str, value: Any, hint: Any) -> None:
    """Sets a field. What is set inside a section is added to it."""
    if not (isinstance(hint, type) and issubclass(hint, Section)):
        node[name] = value
        return
    if node.get(name) is None:
        node[name] = {}
    for section in (value, node[name]):
        if not isinstance(section, dict):
            from_dict(hint, section)  # raises ConfigError
    for key, item in value.items():
        _write(node[name], key, item, field_hint(hint, key))


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The name and the text of each field."""
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
        yield key, text
