"""Where the weights and the model's config are in what a trainer saved."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.porting.families import has_signature
from mythos_jax.porting.pickles import Inert, Name
from mythos_jax.porting.tensor_info import TensorInfo
from mythos_jax.porting.torch_archives import resave
from mythos_jax.porting.wrappers import unwrap

USUAL_KEYS = ("model", "model_state_dict", "state_dict", "module")  # preferred to any other, such as "net"
AVERAGES = ("ema", "swa", "averaged")  # in the names of averaged weights, which are read if there are no others
CONFIG_KEYS = ("model_config", "hyper_parameters", "model_args", "args", "config", "cfg", "hparams")

MOST_NAMED = 8  # places, in an error
SEARCHED_DEPTH = 3  # dicts in dicts
MOST_ENTRIES = 10_000_000  # of all dicts, lists and objects that are looked through
MOST_ITEMS = 100  # of a list
MODULE_ENTRIES = 100  # as many as which a pickled module counts, beside its own
LONGEST_NAME = 1000  # of a module in a pickled module
MOST_VALUES = 100_000  # of a config
LONGEST_TEXT = 1000  # in a config
Place = tuple[str, ...]  # the keys under which something is


def find_weights(path: Path, saved: Any, notes: list[str], key: str | None = None) -> dict[str, TensorInfo]:
    """The tensors of the model by name. Adds a line to `notes` if anything was chosen or left out.

    key: where they are, if there are several models. Raises ConfigError: none, or several that may be meant.
    """
    search = _Search(path)
    search.visit(saved)
    found = search.found
    if not found:
        raise ConfigError(_explain_no_tensors(path, saved))
    if key is not None:
        return _choose(path, found, key)
    if isinstance(saved, list | tuple):
        got, option = type(saved).__name__, _option(found[0][0])
        raise ConfigError(
            f"{path}: got a {got}, allowed: a state dict, or a dict that holds one; {option} reads one of it"
        )
    models = [(place, tensors) for place, tensors in found if _is_model(tensors, path)] or found
    best = min(_rank(place) for place, _ in models)
    chosen = [(place, tensors) for place, tensors in models if _rank(place) == best]
    if len(chosen) > 1 and models is found:  # none is known by its names; the largest is most likely meant
        chosen = [max(chosen, key=lambda pair: len(pair[1]))]
    place, tensors = chosen[0]
    others = [_name(other) for other, same in chosen[1:] if same != tensors]
    if others:
        several = f"{_name(place)} and {', '.join(others)}"
        raise ConfigError(f"{path}: holds models under {several}, allowed: one of them ({_option(place)})")
    left = [other for other, same in models if same != tensors and models is not found]
    if left:
        names = ", ".join(map(_name, left))
        option = f"; `mythos convert {_option(left[0])}` reads those" if left[0] else ""
        notes.append(f"{path}: read: the weights under {_name(place)}; left: those under {names}{option}")
    return tensors


def _choose(path: Path, found: list[tuple[Place, dict[str, TensorInfo]]], key: str) -> dict[str, TensorInfo]:
    """The tensors under a key, which may be the last part of their place."""
    chosen = [tensors for place, tensors in found if ".".join(place) == key]
    chosen = chosen or [tensors for place, tensors in found if place and place[-1] == key]
    if len(chosen) != 1:
        largest = sorted(found, key=lambda pair: -len(pair[1]))[:MOST_NAMED]
        allowed = (
            ", ".join(one_line(".".join(place), 80) for place, _ in largest if place) or "none, it is the whole file"
        )
        raise ConfigError(f"{path}: weights_key: got {key!r}, allowed: {allowed}")
    return chosen[0]


def find_configs(saved: Any) -> list[tuple[str, dict[str, Any]]]:
    """What may be the model's config, with the name of its place, in the order in which it should be tried."""
    found = []
    top = _entries(saved)
    models = [(f"{key}.", _entries(top[key])) for key in USUAL_KEYS if isinstance(top.get(key), Inert)]
    for prefix, entries in [("", top), *models]:
        for key in CONFIG_KEYS:
            inner = _entries(entries.get(key))
            if inner:
                found.append((prefix + key, inner))
                nested = [(name, _entries(inner.get(name))) for name in (*CONFIG_KEYS, "model")]
                found += [(f"{prefix}{key}.{name}", fields) for name, fields in nested if fields]
    return [(place, _Plain().mapping(fields)) for place, fields in found]


def unreadable(path: Path, name: str, tensor: TensorInfo) -> ConfigError:
    """The error for asking for the numbers of a tensor that has none that can be read."""
    return ConfigError(f"{path}: {name}: is {tensor.kind}, allowed: a dense tensor")


class _Search:
    """Every dict of tensors in what was saved, and every pickled module, with the keys that lead to it.

    Raises ConfigError if it takes too long: objects may hold each other, and be held, any number of times.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: list[tuple[Place, dict[str, TensorInfo]]] = []
        self._seen: set[int] = set()
        self._left = MOST_ENTRIES

    def visit(self, value: Any, place: Place = (), depth: int = 0) -> None:
        if id(value) in self._seen or depth > SEARCHED_DEPTH:
            return
        self._seen.add(id(value))
        entries = _entries(value)
        if isinstance(value, Inert) and _is_module(entries):
            self.found.append((place, self._tensors_of_module(entries)))
            return
        if isinstance(value, list | tuple):
            entries = {str(i): item for i, item in enumerate(value[:MOST_ITEMS])}
        self._spend(len(entries) + 1)
        tensors = {name: x for name, x in entries.items() if isinstance(name, str) and isinstance(x, TensorInfo)}
        if tensors and not isinstance(value, list | tuple):
            self.found.append((place, tensors))
        for key, inner in entries.items():
            if isinstance(key, str):
                self.visit(inner, (*place, key), depth + 1)
        for inner in value.arguments[:2] if isinstance(value, Inert) else ():  # torch.compile's first is the module
            self.visit(inner, place, depth + 1)

    def _tensors_of_module(self, top: Mapping[Any, Any]) -> dict[str, TensorInfo]:
        """The parameters and buffers of a pickled `torch.nn.Module`, named as in its state dict."""
        tensors: dict[str, TensorInfo] = {}
        open_modules = [("", top)]
        while open_modules:
            prefix, attributes = open_modules.pop()
            if len(prefix) > LONGEST_NAME:
                raise ConfigError(f"{self.path}: a pickled module contains itself, allowed: a tree of modules")
            transient = attributes.get("_non_persistent_buffers_set")
            transient = transient.arguments[0] if isinstance(transient, Inert) and transient.arguments else transient
            left_out = {name for name in transient if isinstance(name, str)} if isinstance(transient, list) else set()
            groups = [_entries(attributes.get(kind)) for kind in ("_parameters", "_buffers", "_modules")]
            self._spend(MODULE_ENTRIES + len(left_out) + sum(map(len, groups)))
            for group, without in zip(groups[:2], (set(), left_out), strict=True):
                for name, tensor in group.items():
                    if isinstance(tensor, TensorInfo) and name not in without:
                        tensors[f"{prefix}{name}"] = tensor
            for name, module in reversed(list(groups[2].items())):
                open_modules.append((f"{prefix}{name}.", _entries(module)))
        return tensors

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ConfigError(f"{self.path}: its objects hold more than {MOST_ENTRIES:,} others, allowed: fewer")


def _is_module(attributes: Mapping[Any, Any]) -> bool:
    return all(isinstance(attributes.get(name), dict) for name in ("_parameters", "_buffers", "_modules"))


def _entries(value: Any) -> Mapping[Any, Any]:
    """The entries of a dict, or the attributes of an object."""
    if isinstance(value, Inert):
        attributes = value.attributes
        content = attributes.get("_content")  # of OmegaConf's, whose leaves are objects
        return content if isinstance(content, dict) else attributes
    return value if isinstance(value, dict) else {}


def _is_model(tensors: Mapping[str, TensorInfo], path: Path) -> bool:
    try:
        names, _, _ = unwrap(tensors, has_signature, path)
    except ConfigError:  # two of them get the same name
        return False
    return has_signature(set(names))


def _rank(place: Place) -> int:
    """How far a place is from those in which weights usually are."""
    words = {word for key in place for word in key.lower().replace("-", "_").split("_")}
    if any(word.startswith("optim") for word in words):
        return 3
    if words & set(AVERAGES):
        return 2
    return 0 if not place or place[-1] in USUAL_KEYS else 1


def _name(place: Place) -> str:
    return repr(".".join(place)[:80]) if place else "the top"


def _option(place: Place) -> str:
    """The option of `mythos convert` that reads what is there."""
    return f"--weights-key {one_line('.'.join(place), 80)}"


def _explain_no_tensors(path: Path, saved: Any) -> str:
    """The error for a file without weights: what it holds instead."""
    makers = sorted({value.made_by for value in islice(_values(saved), MOST_VALUES) if isinstance(value, Inert)})
    if not makers:
        return f"{path}: holds no tensors; allowed: a state dict, or a dict with one under 'model'"
    names = ", ".join(makers[:3]) + (", …" if len(makers) > 3 else "")
    command = resave(path, "x.state_dict()" if isinstance(saved, Inert) else "x['model']")
    return (
        f"{path}: holds no tensors that can be read without running what it names ({names}); allowed: a state dict: "
        f"if you trust the file, {command}"
    )


def _values(saved: Any) -> Iterator[Any]:
    """The object, what it holds, and what that holds."""
    yield saved
    for value in _entries(saved).values():
        yield value
        yield from _entries(value).values()


class _Plain:
    """Makes plain containers of a config: text of what is neither a number, text nor a container."""

    def __init__(self) -> None:
        self._left = MOST_VALUES

    def mapping(self, value: Mapping[Any, Any], depth: int = 0) -> dict[str, Any]:
        return {key: self._value(inner, depth + 1) for key, inner in value.items() if isinstance(key, str)}

    def _value(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth > SEARCHED_DEPTH + 5:
            return "…"
        if isinstance(value, str):
            return value[:LONGEST_TEXT]
        if isinstance(value, int):
            return value if abs(value) < 2**63 else "…"
        if value is None or isinstance(value, float):
            return value
        if isinstance(value, list | tuple):
            return [self._value(item, depth + 1) for item in value]
        if isinstance(value, Inert) and "_val" in value.attributes:  # a leaf of OmegaConf's
            return self._value(value.attributes["_val"], depth + 1)
        if isinstance(value, Inert) and not value.attributes:  # an Enum by its value, a path by its last part
            return self._value(value.arguments[-1], depth + 1) if value.arguments else f"<{value.made_by}>"
        if isinstance(value, dict | Inert):
            return self.mapping(_entries(value), depth)
        return one_line(value, LONGEST_TEXT) if isinstance(value, Name) else "…"
