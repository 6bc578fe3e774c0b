"""The state of training: what a step replaces and a checkpoint stores, and what a step only reads."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.gather import LOW_RANK


class TrainState(struct.PyTreeNode):
    """Everything that a step replaces.

    step: int32 [], finished steps. variables: params and balance, or of a LoRA run low-rank weights alone. average: a
    moving average of the weights that are trained, or None.
    loss_mean: float32 [], running mean of the loss, 0 at the start. skipped: int32 [], updates skipped so far.
    """

    step: jax.Array
    variables: dict[str, Any]
    optimizer: optax.OptState
    average: Any
    loss_mean: jax.Array
    skipped: jax.Array


class Teacher(struct.PyTreeNode):
    """The model whose predictions a run learns."""

    variables: dict[str, Any]
    model: ModelConfig = struct.field(pytree_node=False)


class Constants(struct.PyTreeNode):
    """Variables that a step reads and does not replace: they are not donated to it, and no checkpoint has them.

    base: those beside the ones that are trained, {"params", "balance"}, and "scales" where matrices are int8; None
    where all of them are trained.
    teacher: None without distillation.
    """

    base: Any = None
    teacher: Teacher | None = None


def trained_collection(variables: Mapping[str, Any]) -> str:
    """The name of the variables that a run trains, among all that its checkpoints have."""
    return LOW_RANK if LOW_RANK in variables else "params"


def eval_variables(variables: dict[str, Any], average: Any) -> dict[str, Any]:
    """The variables to evaluate: with the moving average of the weights if one is kept."""
    return variables if average is None else {**variables, trained_collection(variables): average}
