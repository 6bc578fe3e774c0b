"""What a program will find in its data, written into the names of its operations for `mythos compile` to read.

How many rows an expert gets and how often a loop over them runs is known only at run time. The compiler cannot say what
such a program costs; the one who wrote it can say what an even load makes of it.
"""

import re
from contextlib import AbstractContextManager

import jax

_ROWS, _TRIPS = "expect_rows_", "expect_trips_"


def expect_rows(n: int) -> AbstractContextManager[None]:
    """Of the rows of each grouped product inside, n are expected to belong to an expert."""
    return jax.named_scope(f"{_ROWS}{n}")


def expect_trips(n: int) -> AbstractContextManager[None]:
    """A `while_loop` or a `fori_loop` directly inside is expected to run n times."""
    return jax.named_scope(f"{_TRIPS}{n}")


def expected_rows(op_name: str) -> int | None:
    """The number of the innermost `expect_rows` around an operation, by its name in the compiled program."""
    found = re.findall(rf"\b{_ROWS}(\d+)", op_name)
    return int(found[-1]) if found else None


def expected_trips(op_name: str) -> int | None:
    """The number of the `expect_trips` directly around a loop, by its name in the compiled program."""
    found = re.search(rf"\b{_TRIPS}(\d+)\)*/while$", op_name)
    return int(found.group(1)) if found else None


def is_expectation(name: str) -> bool:
    """Whether a name in the path of an operation is one of these, and names no part of the model."""
    return name.startswith((_ROWS, _TRIPS))
