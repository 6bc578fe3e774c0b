"""Does a model hold exactly the tensors that its config asks for?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mythos_jax.errors import ConfigError
from mythos_jax.porting.reading import Source
from mythos_jax.porting.rope_tables import compare_table
from mythos_jax.processes import log0

SHOWN_PROBLEMS = 4  # in an error of one line
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass
class Coverage:
    """How a source's tensors match its table, judged by names, shapes and dtypes before any is loaded.

    used: the number of tensors that are used, each exactly once; dtypes: how many of them have each dtype.
    parameters: the number of parameters of the model. tied: aliases of a used tensor, with equal contents.
    buffers: tensors that are recomputed here. zeros: missing ones that are zeros then. wrappers: parts that were taken
    off the tensors' names. notes: other lines that the user should see. The rest are problems: missing and unexpected
    tensors by name, and `wrong`, one line for each with the wrong shape, dtype or contents.
    """

    used: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    wrappers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
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

    def lines(self) -> list[str]:
        """What the user should see of how the tensors were read, apart from problems."""
        zeros = [f"not in the file, zeros here: {', '.join(self.zeros)}"] if self.zeros else []
        return [*self.notes, *zeros]


def check_tensors(source: Source) -> Coverage:
    """Compares a source's tensors with its table."""
    coverage = Coverage(wrappers=list(source.wrappers), notes=list(source.notes))
    our_shapes = source.table.our_shapes
    coverage.parameters = sum(math.prod(shape) for path, shape in our_shapes.items() if path.startswith("params."))
    present = _check_expected(source, coverage)
    _check_others(source, present, coverage)
    return coverage


def require_tensors(source: Source) -> Coverage:
    """As `check_tensors`; logs the notes, once for a source. Raises ConfigError, one line with the first problems, if
    there are any."""
    coverage = check_tensors(source)
    problems = coverage.problems
    if problems:
        raise ConfigError(
            f"{source.path}: its tensors do not fit its config ({source.family.name}): {shortened(problems)}"
        )
    for note in () if source.checked else coverage.lines():
        log0(note)
    source.checked = True
    return coverage


def shortened(problems: Sequence[str]) -> str:
    """The first of them, for an error of one line."""
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def _check_expected(source: Source, coverage: Coverage) -> set[str]:
    """Checks every tensor that the table asks for. Returns the stored names of those that are there."""
    alias_of = {tied_to: alias for alias, tied_to in source.family.ties(source.config).items()}
    present = set()
    for name, shape in source.table.their_shapes.items():
        stored_name = name if name in source.tensors else alias_of.get(name, name)
        if stored_name not in source.tensors:
            (coverage.zeros if name in source.family.zeros else coverage.missing).append(name)
            continue
        present.add(stored_name)
        tensor = source.tensors[stored_name]
        dtype = tensor.dtype.name
        if tensor.kind:
            coverage.wrong.append(f"{stored_name}: is {tensor.kind}, allowed: a dense tensor of {', '.join(FLOATS)}")
        elif tensor.shape != shape:
            hint = " (it looks transposed)" if tensor.shape == shape[::-1] else ""
            coverage.wrong.append(f"{stored_name}: shape {list(tensor.shape)}, expected {list(shape)}{hint}")
        elif dtype not in (allowed := ("int8",) if name in source.table.int8 else FLOATS):
            coverage.wrong.append(f"{stored_name}: dtype {dtype}, allowed: {', '.join(allowed)}")
        else:
            coverage.used += 1
            coverage.dtypes[dtype] = coverage.dtypes.get(dtype, 0) + 1
    return present


def _check_others(source: Source, present: set[str], coverage: Coverage) -> None:
    """Classifies the tensors that the table does not ask for: aliases, buffers, and unexpected ones."""
    for name in source.tensors:
        if name in present:
            continue
        tied_to = source.family.ties(source.config).get(name)
        if tied_to in present:
            if _same_bits(source, name, tied_to):
                coverage.tied.append(name)
            else:
                coverage.wrong.append(f"{name}: differs from {tied_to}, allowed: equal values, since the two are tied")
        elif source.family.is_buffer(name):
            coverage.buffers.append(name)
            _check_buffer(source, name, coverage)
        else:
            coverage.unexpected.append(name)


def _check_buffer(source: Source, name: str, coverage: Coverage) -> None:
    """Compares a stored table of RoPE with the one that its config asks for."""
    if source.tensors[name].kind:
        return
    try:
        note = compare_table(name, source.read(name), source.config)
    except ConfigError as error:
        coverage.wrong.append(str(error))
    else:
        coverage.notes += [f"{source.path}: {note}"] if note else []


def _same_bits(source: Source, name: str, other: str) -> bool:
    """Whether two tensors are equal bit by bit, NaNs included."""
    if source.tensors[name] != source.tensors[other]:
        return False
    if source.tensors[name].kind:  # the other is a problem already
        return True
    bits, other_bits = (np.ascontiguousarray(source.read(n)).view(np.uint8) for n in (name, other))
    return np.array_equal(bits, other_bits)
