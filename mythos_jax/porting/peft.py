"""Low-rank weights in the format of Hugging Face's PEFT: `adapter_model.safetensors` and `adapter_config.json`.

Beside a matrix W, [out, in], PEFT has A, [R, in], and B, [out, R]: the product is with W + scale B A. Ours are a,
[*inputs, R], and b, [R, *outputs] (model/low_rank.py). The table of a family says which module of theirs is which
matrix of ours, and the layout of its row also moves the axes of A and B; nothing is computed.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.porting import native
from mythos_jax.porting.coverage import FLOATS, shortened
from mythos_jax.porting.families import FAMILIES
from mythos_jax.porting.family import Family
from mythos_jax.porting.layouts import Shape, input_axes, low_rank_layouts, their_shape, to_ours, to_theirs
from mythos_jax.porting.peft_config import (
    ALL_LINEAR,
    CONFIG_FILE,
    HEAD,
    AdapterConfig,
    config_fields,
    target_names,
)
from mythos_jax.porting.reading import open_tensors
from mythos_jax.porting.tables import Table
from mythos_jax.porting.writing import new_directory, save_safetensors
from mythos_jax.typed import nearest_name

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # in order of preference
PREFIX = "base_model.model."
PARTS = {"A": 0, "B": 1}
_BLOCK = 2**16  # numbers that a core keeps near it
_KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


@dataclass(frozen=True)
class Module:
    """A linear map of theirs that has a tensor of its own. path: of our parameter; shape: of it; layouts: of A and
    B."""

    name: str
    path: str
    shape: tuple[int, ...]
    layouts: tuple[str, str]

    def our_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a and b."""
        inputs = input_axes(self.layouts[0])
        return (*self.shape[:inputs], rank), (rank, *self.shape[inputs:])

    def their_shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Of A and B."""
        return tuple(map(their_shape, self.layouts, self.our_shapes(rank)))

    def to_ours(self, part: int, array: np.ndarray, rank: int) -> np.ndarray:
        """Part 0 or 1, A or B, as our a or b."""
        return to_ours(self.layouts[part], array, self.our_shapes(rank)[part])

    def to_theirs(self, part: int, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(to_theirs(self.layouts[part], array))


def modules_of(table: Table) -> dict[str, Module]:
    """The linear maps of a model that are tensors of their own, by their names: what PEFT can adapt."""
    found = {}
    for row in table.rows:
        layouts = low_rank_layouts(row.layout)
        if layouts is not None and len(row.theirs) == len(row.ours) == 1:
            name, path = row.theirs[0].removesuffix(".weight"), row.ours[0]
            found[name] = Module(name, path, table.our_shapes[path], layouts)
    return found


@dataclass(frozen=True)
class Adapter:
    """The low-rank weights of a PEFT directory, for one base model. modules: those that are adapted."""

    directory: Path
    config: AdapterConfig
    modules: tuple[Module, ...]
    notes: tuple[str, ...]
    _read: Callable[[str, str], np.ndarray]

    def low_rank(self, module: Module) -> tuple[np.ndarray, np.ndarray]:
        """Our a and b, float32, not scaled."""
        rank = self.config.rank_of(module.name)
        a, b = (
            module.to_ours(number, self._read(module.name, part), rank).astype(np.float32)
            for part, number in PARTS.items()
        )
        return a, b

    def product(self, module: Module) -> np.ndarray:
        """What is added to the matrix: the same bits on every machine, since runs remember which weights they used.
        (A product of BLAS rounds as its kernel for this CPU does.)"""
        a, b = self.low_rank(module)
        product = _fixed_product(a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1))
        return (product * np.float32(self.config.scale_of(module.name))).reshape(module.shape)

    def tree(self) -> dict[str, Any]:
        """{"a", "b"}, not scaled, at the path of each matrix below `params`."""
        flat: dict[str, np.ndarray] = {}
        for module in self.modules:
            a, b = self.low_rank(module)
            name = module.path.removeprefix("params.")
            flat |= {f"{name}.a": a, f"{name}.b": b}
        return unflatten_dict(flat, sep=".")


def _fixed_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b in float32: each product is rounded, then added in the order of the shared axis, as IEEE 754 says."""
    product = np.zeros((len(a), b.shape[1]), np.float32)
    rows = max(1, _BLOCK // max(1, b.shape[1]))
    term = np.empty((min(rows, len(a)), b.shape[1]), np.float32)
    for start in range(0, len(a), rows):
        block = product[start : start + rows]
        for k in range(len(b)):
            np.multiply(a[start : start + rows, k, None], b[k], out=term[: len(block)])
            np.add(block, term[: len(block)], out=block)
    return product


def is_adapter(path: str | Path) -> bool:
    """Whether this is a directory of PEFT's."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_adapter(directory: Path, config: AdapterConfig, table: Table, base: str) -> Adapter:
    """table: of the base, with the names of its original. Raises ConfigError: no weights, damaged ones, tensors that
    are not those that `config` asks for."""
    path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if path is None:
        raise ConfigError(f"{directory}: has no {WEIGHT_FILES[0]}; allowed: what PEFT's save_pretrained has written")
    modules = _adapted(config, modules_of(table), table.their_shapes)
    file = open_tensors(path)
    stored, unexpected = _stored_names(path, file.tensors)
    wanted = {(module.name, part): module for module in modules for part in PARTS}
    problems = [f"missing: {PREFIX}{name}.lora_{part}.weight" for name, part in wanted if (name, part) not in stored]
    problems += [f"unexpected: {name}" for name in unexpected]
    for key, name in stored.items():
        if key not in wanted:
            problems.append(f"unexpected: {name}")
            continue
        tensor = file.tensors[name]
        shape = wanted[key].their_shapes(config.rank_of(key[0]))[PARTS[key[1]]]
        if tensor.kind or tensor.dtype.name not in FLOATS:
            problems.append(f"{name}: is {tensor.kind or tensor.dtype.name}, allowed: {', '.join(FLOATS)}")
        elif tensor.shape != shape:
            problems.append(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
    if problems:
        raise ConfigError(f"{path}: its tensors do not fit {CONFIG_FILE} and {base}: {shortened(problems)}")
    notes = (f"{directory}: low-rank weights beside {len(modules)} matrices", *file.notes)
    return Adapter(directory, config, tuple(modules), notes, lambda name, part: file.read(stored[name, part]))


def _stored_names(path: Path, names: Iterable[str]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """The name of the tensor of each module's part, and the names that are not those of such tensors. The name of the
    adapter, which versions of PEFT and other trainers leave in, is not looked at if it is one."""
    found: dict[tuple[str, str], str] = {}
    others, adapters = [], set()
    for name in names:
        match = _KEY.fullmatch(name)
        if match is None:
            others.append(name)
            continue
        adapters.add(match["adapter"])
        key = match["module"], match["part"]
        if key in found and len(adapters) == 1:
            others.append(name)
        found[key] = name
    if len(adapters) > 1:
        several = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise ConfigError(f"{path}: holds the adapters {several}, allowed: one")
    return found, others


def _adapted(config: AdapterConfig, modules: Mapping[str, Module], tensors: Iterable[str]) -> list[Module]:
    """The modules that a config gives low-rank weights. tensors: the names of all tensors of the model.

    Raises ConfigError if there are none, with the nearest names, and for others than linear maps."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    chosen = [name for name in dict.fromkeys([*names, HEAD]) if config.adapts(name)]
    allowed = sorted({name.rpartition(".")[2] for name in modules})
    others = [name for name in chosen if name not in modules]
    if others and config.targets != (ALL_LINEAR,):
        got = f"{HEAD}, but the head has no low-rank weights here" if others[0] == HEAD else others[0]
        raise ConfigError(f"{config.where}: target_modules: got {got}; allowed: {', '.join(allowed)}")
    found = [modules[name] for name in chosen if name in modules]
    if not found:
        texts = config.targets if isinstance(config.targets, tuple) else (config.targets.pattern,)
        near = nearest_name(texts[0].rpartition(".")[2], allowed, cutoff=0.6) if texts else None
        hint = f"; did you mean {near}?" if near else ""
        got = ", ".join(texts) or "nothing"
        raise ConfigError(f"{config.where}: target_modules: got {got}, allowed: {', '.join(allowed)}{hint}")
    return found


def family_for(config: ModelConfig, preferred: str | None, where: str) -> Family:
    """The format of an original in which a model of ours can be written, `preferred` if it is one. Raises ConfigError,
    with what the nearest one cannot express."""
    families = [family for family in FAMILIES.values() if family not in native.FAMILIES]
    families.sort(key=lambda family: family.name != preferred)
    problems = {family.name: family.inexpressible(config) for family in families}
    for family in families:
        if not problems[family.name]:
            return family
    nearest = min(problems, key=lambda name: len(problems[name]))
    raise ConfigError(
        f"{where}: PEFT knows models of transformers only, and {nearest} cannot express {problems[nearest][0]}"
    )


def write_adapter(
    path: str | Path,
    family: Family,
    config: ModelConfig,
    low_rank: Mapping[str, Any],
    rank: int,
    alpha: float,
    base: str,
) -> dict[str, tuple[Shape, str]]:
    """Writes a new PEFT directory. Returns shapes and dtypes by name.

    low_rank: {"a", "b"}, not scaled, at the path of each matrix below `params`. base: the name of the model that was
    adapted. Raises ConfigError for a matrix that shares a tensor of `family` with others.
    """
    table = family.table(config)
    by_path = {module.path: module for module in modules_of(table).values()}
    arrays = {f"params.{name}": np.asarray(array) for name, array in flatten_dict(dict(low_rank), sep=".").items()}
    paths = dict.fromkeys(name.rpartition(".")[0] for name in arrays)
    fused = [path for path in paths if path not in by_path]
    if fused:
        tensor = table.tensors_of(fused[0])[0]
        raise ConfigError(
            f"{path}: {fused[0].removeprefix('params.')} is a part of {family.name}'s {tensor}, to which PEFT "
            f"adds low-rank weights as a whole; allowed: the merged model (--to {family.name})"
        )
    tensors = {}
    for module in (by_path[path] for path in by_path if path in paths):
        for part, number in PARTS.items():
            array = arrays[f"{module.path}.{part.lower()}"]
            tensors[f"{PREFIX}{module.name}.lora_{part}.weight"] = module.to_theirs(number, array)
    adapted = [by_path[path].name for path in paths]
    names = [module.name for module in by_path.values()]
    fields = config_fields(target_names(adapted, names), rank, alpha, base)
    with new_directory(path) as directory:
        (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_safetensors(tensors, directory / WEIGHT_FILES[0])
    return {name: (array.shape, array.dtype.name) for name, array in tensors.items()}
