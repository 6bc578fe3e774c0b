"""The files of a model beside its config and its weights: tokenizer, settings of generation, licence, code."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mythos_jax.data.conventions import GENERATION_FILE
from mythos_jax.json_text import parse_json
from mythos_jax.porting.origin import BUFFERS_FILE, FIELDS_FILE

TEMPLATES = ("chat_template.jinja", "chat_template.json")
# Files of every model, whatever its family. Not README.md, which describes other files than those beside it.
SHARED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    GENERATION_FILE,
    *TEMPLATES,
)
LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)\b.*", re.IGNORECASE)
OURS = ("config.json", FIELDS_FILE, BUFFERS_FILE)  # written anew
HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)

Content = Callable[[], bytes]


@dataclass(frozen=True)
class Companions:
    """copied, made: how to get the content of each file, by name. left: names of the source's other files."""

    copied: Mapping[str, Content] = field(default_factory=dict)
    made: Mapping[str, Content] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def with_text_of(self, directory: Path) -> "Companions":
        """With the tokenizer of another directory, its settings and its templates in place of those of this one; its
        settings of generation, too, if it has any."""
        theirs = {name: (directory / name).read_bytes for name in SHARED if (directory / name).is_file()}
        dropped = {*SHARED} - {GENERATION_FILE}
        copied = {name: content for name, content in self.copied.items() if name not in dropped} | theirs
        return replace(self, copied=copied)

    def write(self, directory: Path) -> None:
        for name, content in {**self.copied, **self.made}.items():
            (directory / name).write_bytes(content())


def companions_of(directory: Path, weights: Iterable[Path], with_code: bool) -> Companions:
    """Those of a pretrained model's directory. weights: its files of tensors. with_code: also copy the model's code."""
    known = {*OURS, *(path.name for path in weights), *(f"{path.name}.index.json" for path in weights)}
    names = sorted(path.name + "/" * path.is_dir() for path in directory.iterdir() if not path.name.startswith("."))
    wanted = {*SHARED, *(code_files(directory) if with_code else ())}
    copied = [name for name in names if name in wanted or (LEGAL.fullmatch(name) and not name.endswith("/"))]
    left = [name for name in names if name not in copied and name not in known and not name.endswith(".index.json")]
    return Companions({name: (directory / name).read_bytes for name in copied}, left=tuple(left))


def code_files(directory: Path) -> list[str]:
    """The Python files that the `auto_map` of the config and of the tokenizer name, and those that these import."""
    maps = [_read(directory / name).get("auto_map") for name in ("config.json", "tokenizer_config.json")]
    origin = _read(directory / FIELDS_FILE).get("config")
    maps.append(origin.get("auto_map") if isinstance(origin, Mapping) else None)
    found: list[str] = []
    open_names = [module for auto_map in maps for module in local_modules(auto_map)]
    while open_names:
        name = open_names.pop()
        path = directory / name
        if name not in found and path.is_file():
            found.append(name)
            open_names += [
                f"{module}.py" for module in _IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
            ]
    return sorted(found)


def local_modules(auto_map: Any) -> list[str]:
    """The files that an `auto_map` expects beside it; a class of another repository is written `repository--…`."""
    values = auto_map.values() if isinstance(auto_map, Mapping) else ()
    classes = [name for value in values for name in (value if isinstance(value, list) else [value])]
    local = [name for name in classes if isinstance(name, str) and not re.search(r"--|[/\\]", name) and "." in name]
    return sorted({f"{name.split('.')[0]}.py" for name in local})


def _read(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if there is no such file, or if it is not an object."""
    try:
        tree = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
