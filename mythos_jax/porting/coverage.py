"""Does a file hold exactly the tensors that its config asks for?"""

import math
from dataclasses import dataclass, field

import numpy as np

from mythos_jax.errors import ConfigError
from mythos_jax.porting.reading import Source


@dataclass
class Coverage:
    """What was found of a source's tensors, before any is read.

    used: each exactly once. tied: aliases of a used one, found equal to it. buffers: recomputed here, not read.
    Problems: missing; unexpected; wrong, one line each.
    """

    used: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return [
            *(f"missing: {name}" for name in self.missing),
            *(f"unexpected: {name}" for name in self.unexpected),
            *self.wrong,
        ]


def cover(source: Source) -> Coverage:
    """Compares a source's tensors with its table."""
    found, family, table = Coverage(), source.family, source.table
    aliases = {key: alias for alias, key in family.tied.items()}
    seen = set()
    for name, shape in table.their_shapes.items():
        stored = name if name in source.tensors else aliases.get(name)
        if stored not in source.tensors:
            found.missing.append(name)
            continue
        seen.add(stored)
        tensor = source.tensors[stored]
        if tensor.shape != shape:
            turned = " (it looks transposed)" if tensor.shape == shape[::-1] else ""
            found.wrong.append(f"{stored}: shape {list(tensor.shape)}, expected {list(shape)}{turned}")
        elif not _is_float(tensor.dtype):
            found.wrong.append(f"{stored}: dtype {tensor.dtype.name}, allowed: floating point")
        else:
            found.used += 1
            found.dtypes[tensor.dtype.name] = found.dtypes.get(tensor.dtype.name, 0) + 1
    for name in source.tensors:
        if name in seen:
            continue
        key = family.tied.get(name)
        if key in seen:
            if _differ(source, name, key):
                found.wrong.append(f"{name}: differs from {key}, allowed: tied, the same numbers")
            else:
                found.tied.append(name)
        elif name in family.buffers:
            found.buffers.append(name)
        else:
            found.unexpected.append(name)
    found.parameters = sum(math.prod(shape) for path, shape in table.ours.items() if path.startswith("params."))
    return found


def require_covered(source: Source) -> Coverage:
    """The coverage, or a ConfigError of one line with the first problems."""
    found = cover(source)
    if found.problems:
        more = len(found.problems) - 4
        text = "; ".join(found.problems[:4]) + (f"; and {more} more" if more > 0 else "")
        raise ConfigError(f"{source.path}: its tensors do not fit its config ({source.family.name}): {text}")
    return found


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _differ(source: Source, alias: str, key: str) -> bool:
    """Whether two tensors differ in any bit; NaNs compare by their bits."""
    if source.tensors[alias] != source.tensors[key]:
        return True
    one, other = (np.ascontiguousarray(source.read(name)).view(np.uint8) for name in (alias, key))
    return not np.array_equal(one, other)
