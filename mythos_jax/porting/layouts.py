"""Axis layouts: einops patterns from the reference's axes to ours, applied in both directions.

`(h k) d -> d h k` splits their first axis into heads and channels and moves the input axis to the front. Values are
only moved, never computed, so a round trip is exact in every dtype.
"""

import re
from functools import cache

import numpy as np
from einops import parse_shape, rearrange

Shape = tuple[int, ...]

SAME = ""
# PyTorch stores a linear map as [out, in]; ours are [in, out].
LINEAR = "d_out d_in -> d_in d_out"
TO_HEADS = "(h k) d -> d h k"
FROM_HEADS = "d (h k) -> h k d"
# Rotary embeddings rotate pairs of channels: (i, i + k/2) in theirs, adjacent ones in ours. Moving the rows of queries
# and keys moves the pairs; scores stay the same.
HALVES_TO_HEADS = "(h two half) d -> d h (half two)"
HALVES_OF_HEADS = "(h two half) -> h (half two)"  # of a bias, or of a norm over all heads
HALVES = "(two half) -> (half two)"  # of a norm over one head
BIAS_OF_HEADS = "(h k) -> h k"


def to_ours(layout: str, array: np.ndarray, our_shape: Shape) -> np.ndarray:
    """Their array in our layout, where it has the shape `our_shape`."""
    if layout == SAME:
        return array
    # einops cannot infer both factors of their `(h k)`; our shape has most axes on their own.
    _, our_axes = layout.split("->")
    return rearrange(array, layout, **parse_shape(_placeholder(our_shape), _single(our_axes)), **_fixed(layout))


def to_theirs(layout: str, array: np.ndarray) -> np.ndarray:
    """Our array in their layout."""
    if layout == SAME:
        return array
    their_axes, our_axes = layout.split("->")
    return rearrange(array, f"{our_axes} -> {their_axes}", **_fixed(layout))


def low_rank_layouts(layout: str) -> tuple[str, str] | None:
    """The layouts of the factors of a matrix: theirs are [R, in] and [out, R], ours [*inputs, R] and [R, *outputs].

    None for a layout that is not that of a linear map stored as [out, in] there and as [*inputs, *outputs] here.
    """
    if layout == SAME:
        return None
    theirs, ours = (re.findall(r"\([^)]*\)|\w+", axes) for axes in layout.split("->"))
    if len(theirs) != 2:
        return None
    outputs, inputs = theirs
    ours_in = [group for group in ours if _atoms(group) <= _atoms(inputs)]
    ours_out = [group for group in ours if _atoms(group) <= _atoms(outputs)]
    if ours != ours_in + ours_out:
        return None
    return f"rank {inputs} -> {' '.join(ours_in)} rank", f"{outputs} rank -> rank {' '.join(ours_out)}"


def input_axes(layout: str) -> int:
    """How many axes of our array come before the rank, in the first of the `low_rank_layouts`."""
    _, _, ours = layout.partition("->")
    return len(re.findall(r"\([^)]*\)|\w+", ours)) - 1


def _atoms(axes: str) -> set[str]:
    return set(re.findall(r"\w+", axes))


def _single(axes: str) -> str:
    """The axes with those that are made of several left out of account."""
    return re.sub(r"\([^)]*\)", "_", axes)


def _fixed(layout: str) -> dict[str, int]:
    return {"two": 2} if "two" in layout else {}


@cache
def their_shape(layout: str, our_shape: Shape) -> Shape:
    """The shape that an array of `our_shape` has in their layout."""
    return to_theirs(layout, _placeholder(our_shape)).shape


def _placeholder(shape: Shape) -> np.ndarray:
    """An array with a shape but no memory of its own: all its strides are zero."""
    return np.broadcast_to(np.float32(0), shape)
