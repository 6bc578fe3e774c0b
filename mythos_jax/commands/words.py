"""The words of a command line: which are overrides of config fields, and which are flags that do not exist."""

import argparse
from collections.abc import Iterator, Sequence

from mythos_jax.typed import nearest_name

# Earlier names of flags.
RENAMED = {"--held-out": "--held-out-fraction"}


def split_overrides(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[list[str], list[str], str]:
    """The words that argparse is to read, the overrides among them (`--section.field value`), and what is wrong with a
    flag that does not exist; empty if all do.

    parser: that of the command, without subcommands. Overrides may stand anywhere, also before the positionals.
    """
    flags, fields = _flags(parser), _fields(parser)
    plain: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if word == "--" or word in _takes_the_rest(parser):
            return [*plain, word, *rest], overrides, ""
        if not word.startswith("--") or " " in name or name in flags:
            plain.append(word)
        elif fields and ("." in name or name.removeprefix("--") in fields):
            overrides.append(word)
            if not equals and rest and not rest[0].startswith("--"):
                overrides.append(rest.pop(0))
        else:
            return plain, overrides, _unknown(parser, name, [*flags, *(f"--{field}" for field in fields)])
    return plain, overrides, ""


def find_parser(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the (sub)command that the words name."""
    for word in words:
        choices = next(_subcommands(parser), None)
        if choices is None or not (word in choices or word.startswith("-")):
            break
        parser = choices.get(word, parser)
    return parser


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[dict[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield action.choices


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _takes_the_rest(parser: argparse.ArgumentParser) -> list[str]:
    """Flags after which all words are another program's."""
    return [flag for action in parser._actions if action.nargs == argparse.REMAINDER for flag in action.option_strings]


def _fields(parser: argparse.ArgumentParser) -> list[str]:
    """The sections and fields that a command's overrides may begin with; none if it takes none."""
    if not parser.get_default("takes_overrides"):
        return []
    from mythos_jax.config import Config
    from mythos_jax.typed import annotated_hints

    return list(annotated_hints(Config))


def _unknown(parser: argparse.ArgumentParser, name: str, known: list[str]) -> str:
    if RENAMED.get(name) in known:
        return f"{name} is now {RENAMED[name]}"
    near = nearest_name(name, known, cutoff=0.5)
    return f"unknown argument {name!r} for `{parser.prog}`; " + (f"did you mean {near}?" if near else "see its --help")
