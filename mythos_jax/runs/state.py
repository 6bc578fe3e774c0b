"""The state of training: what a step replaces and a checkpoint stores."""

from typing import Any

import jax
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
    """Everything that a step replaces.

    step: int32 [], finished steps. variables: params and balance. average: a moving average of params, or None.
    loss_mean: float32 [], running mean of the loss, 0 at the start. skipped: int32 [], updates skipped so far.
    """

    step: jax.Array
    variables: dict[str, Any]
    optimizer: optax.OptState
    average: Any
    loss_mean: jax.Array
    skipped: jax.Array


def eval_variables(variables: dict[str, Any], average: Any) -> dict[str, Any]:
    """The variables to evaluate: with the moving average of the weights if one is kept."""
    return variables if average is None else {**variables, "params": average}
