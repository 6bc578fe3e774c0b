"""Running several verbs in one `apply`."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from mythos_jax.model.mythos import Mythos

Result = TypeVar("Result")


def apply(
    forward: Callable[..., Result],
    model: Mythos,
    variables: Any,
    *arguments: Any,
    rngs: dict[str, jax.Array] | None = None,
) -> Result:
    """`forward(model, *arguments)` with the model bound to its variables, so that `forward` can call any of its
    methods, in any order, in one program."""
    return cast(Result, model.apply(variables, *arguments, method=forward, rngs=rngs))
