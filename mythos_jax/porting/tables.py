"""Tables of which tensors of a reference implementation hold which of our parameters, read in both directions.

A row pairs their tensors with our parameters that hold the same numbers. There are four kinds:

    rename  one tensor is one parameter
    split   one tensor holds several parameters one after the other, such as a fused projection
    concat  several tensors follow each other along an axis of one parameter
    stack   several tensors are stacked along a new first axis of one parameter, such as the experts of a layer

and one more for our own formats:

    quantized  int8 values and their float32 scales are one parameter

The layout of a row (`layouts.py`) says how the axes of one tensor, or one piece of it, become ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from mythos_jax.model.storage import quantize
from mythos_jax.porting.layouts import SAME, Shape, their_shape, to_ours, to_theirs

ReadArray = Callable[[str], np.ndarray]  # an array by its name


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds the numbers of all."""
    try:
        return np.result_type(*dtypes)
    except TypeError:  # float16 and bfloat16: neither holds the other
        return np.dtype(np.float32)


def join(pieces: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Concatenates arrays of any dtypes."""
    dtype = common_dtype(piece.dtype for piece in pieces)
    return np.concatenate([piece.astype(dtype, copy=False) for piece in pieces], axis)


@dataclass(frozen=True)
class Row(ABC):
    """Tensors and parameters that hold the same numbers: `theirs` by name, `ours` by dotted path."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: str

    @abstractmethod
    def their_shapes(self, our_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of their tensors by name."""

    @abstractmethod
    def read(self, path: str, our_shapes: Mapping[str, Shape], read_theirs: ReadArray) -> np.ndarray:
        """Our parameter at `path`, from their tensors; the dtype is kept."""

    @abstractmethod
    def write(self, read_ours: ReadArray) -> Iterator[tuple[str, np.ndarray]]:
        """Their tensors with their names, from our parameters; dtypes are kept."""


@dataclass(frozen=True)
class _Rename(Row):
    def their_shapes(self, our_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        return {self.theirs[0]: their_shape(self.layout, our_shapes[self.ours[0]])}

    def read(self, path: str, our_shapes: Mapping[str, Shape], read_theirs: ReadArray) -> np.ndarray:
        return to_ours(self.layout, read_theirs(self.theirs[0]), our_shapes[path])

    def write(self, read_ours: ReadArray) -> Iterator[tuple[str, np.ndarray]]:
        yield self.theirs[0], to_theirs(self.layout, read_ours(self.ours[0]))


@dataclass(frozen=True)
class _Split(Row):
    axis: int  # of their tensor
    layouts: tuple[str, ...]  # of each piece; they agree on their axes

    def their_shapes(self, our_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        shape = list(their_shape(self.layout, our_shapes[self.ours[0]]))
        shape[self.axis] = sum(self._sizes(our_shapes))
        return {self.theirs[0]: tuple(shape)}

    def read(self, path: str, our_shapes: Mapping[str, Shape], read_theirs: ReadArray) -> np.ndarray:
        fused, number = read_theirs(self.theirs[0]), self.ours.index(path)
        ends = list(accumulate(self._sizes(our_shapes)))
        piece = np.split(fused, ends[:-1], self.axis)[number]
        return to_ours(self.layouts[number], piece, our_shapes[path])

    def write(self, read_ours: ReadArray) -> Iterator[tuple[str, np.ndarray]]:
        layouts = zip(self.layouts, self.ours, strict=True)
        pieces = [to_theirs(layout, read_ours(path)) for layout, path in layouts]
        yield self.theirs[0], join(pieces, self.axis)

    def _sizes(self, our_shapes: Mapping[str, Shape]) -> list[int]:
        """The size of each parameter along the axis of their tensor."""
        layouts = zip(self.layouts, self.ours, strict=True)
        return [their_shape(layout, our_shapes[path])[self.axis] for layout, path in layouts]


@dataclass(frozen=True)
class _Concat(Row):
    axis: int  # of our parameter
    widths: tuple[int, ...]  # of each tensor along that axis

    def their_shapes(self, our_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        pieces = self._piece_shapes(our_shapes)
        return {name: their_shape(self.layout, piece) for name, piece in zip(self.theirs, pieces, strict=True)}

    def read(self, path: str, our_shapes: Mapping[str, Shape], read_theirs: ReadArray) -> np.ndarray:
        pieces = zip(self.theirs, self._piece_shapes(our_shapes), strict=True)
        return join([to_ours(self.layout, read_theirs(name), piece) for name, piece in pieces], self.axis)

    def write(self, read_ours: ReadArray) -> Iterator[tuple[str, np.ndarray]]:
        ends = list(accumulate(self.widths))
        pieces = np.split(read_ours(self.ours[0]), ends[:-1], self.axis)
        for name, piece in zip(self.theirs, pieces, strict=True):
            yield name, to_theirs(self.layout, piece)

    def _piece_shapes(self, our_shapes: Mapping[str, Shape]) -> list[Shape]:
        """Of our parameter, the part that each tensor holds."""
        shape = our_shapes[self.ours[0]]
        return [(*shape[: self.axis], width, *shape[self.axis + 1 :]) for width in self.widths]


@dataclass(frozen=True)
class _Stack(Row):
    def their_shapes(self, our_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        shape = their_shape(self.layout, our_shapes[self.ours[0]][1:])
        return dict.fromkeys(self.theirs, shape)

    def read(self, path: str, our_shapes: Mapping[str, Shape], read_theirs: ReadArray) -> np.ndarray:
        return join([to_ours(self.layout, read_theirs(name), our_shapes[path][1:])[None] for name in self.theirs], 0)

    def write(self, read_ours: ReadArray) -> Iterator[tuple[str, np.ndarray]]:
        for name, piece in zip(self.theirs, read_ours(self.ours[0]), strict=True):
            yield name, to_theirs(self.layout, piece)


@dataclass(frozen=True)
class _Quantized(Row):
    inputs: tuple[int, ...]  # the axes that products sum over

    def their_shapes(self, our_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        values, scales = self.theirs
        shape = our_shapes[self.ours[0]]
        return {values: shape, scales: tuple(1 if i in self.inputs else size for i, size in enumerate(shape))}

    def read(self, path: str, our_shapes: Mapping[str, Shape], read_theirs: ReadArray) -> np.ndarray:
        values, scales = map(read_theirs, self.theirs)
        return values.astype(np.float32) * scales

    def write(self, read_ours: ReadArray) -> Iterator[tuple[str, np.ndarray]]:
        return zip(self.theirs, quantize(read_ours(self.ours[0]), self.inputs), strict=True)


def rename(theirs: str, ours: str, layout: str = SAME) -> Row:
    """One tensor is one parameter."""
    return _Rename((theirs,), (ours,), layout)


def split(theirs: str, ours: Sequence[str], layout: str | Sequence[str], axis: int = 0) -> Row:
    """One tensor holds several parameters, one after the other along `axis` of the tensor. layout: one for all of them,
    or one for each."""
    layouts = (layout,) * len(ours) if isinstance(layout, str) else tuple(layout)
    return _Split((theirs,), tuple(ours), layouts[0], axis, layouts)


def concat(theirs: Sequence[str], ours: str, layout: str, axis: int, widths: Sequence[int]) -> Row:
    """Several tensors, each `widths` wide, follow each other along `axis` of our parameter."""
    return _Concat(tuple(theirs), (ours,), layout, axis, tuple(widths))


def stack(theirs: Sequence[str], ours: str, layout: str) -> Row:
    """Several tensors are stacked along a new first axis of our parameter."""
    return _Stack(tuple(theirs), (ours,), layout)


def quantized(values: str, scales: str, ours: str, inputs: Sequence[int]) -> Row:
    """int8 values and float32 scales of size 1 along `inputs`, multiplied, are one parameter (`quantize`)."""
    return _Quantized((values, scales), (ours,), SAME, tuple(inputs))


def with_prefix(rows: Iterable[Row], theirs: str, ours: str) -> list[Row]:
    """The rows with a prefix in front of every name of theirs and every path of ours."""
    return [
        replace(row, theirs=tuple(theirs + name for name in row.theirs), ours=tuple(ours + path for path in row.ours))
        for row in rows
    ]


class Table:
    """The rows of one model.

    our_shapes: the shapes of our parameters by dotted path; their_shapes: those that their tensors must have, by name.
    int8: the tensors that are integers.
    Raises AssertionError unless the rows hold each parameter exactly once.
    """

    def __init__(self, rows: Iterable[Row], our_shapes: dict[str, Shape]):
        self.rows = list(rows)
        self.our_shapes = our_shapes
        paths = [path for row in self.rows for path in row.ours]
        if sorted(paths) != sorted(our_shapes):
            mismatch = sorted({*paths} ^ {*our_shapes}) or "repeated rows"
            raise AssertionError(f"the table does not fit the model: {mismatch}")
        self._row_of = {path: row for row in self.rows for path in row.ours}
        self.int8 = {row.theirs[0] for row in self.rows if isinstance(row, _Quantized)}
        self.their_shapes: dict[str, Shape] = {}
        for row in self.rows:
            self.their_shapes |= row.their_shapes(our_shapes)

    def read(self, path: str, read_theirs: ReadArray) -> np.ndarray:
        """Our parameter at `path`, made from the tensors that `read_theirs` returns by name; the dtype is kept."""
        return self._row_of[path].read(path, self.our_shapes, read_theirs)

    def tensors_of(self, path: str) -> tuple[str, ...]:
        """Names of the tensors that our parameter at `path` is made from."""
        return self._row_of[path].theirs
