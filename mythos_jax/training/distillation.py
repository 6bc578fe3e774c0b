"""Distillation: a second model, the teacher, whose predictions a run learns beside the text."""

from typing import Any

import jax

from mythos_jax.config import DistillationConfig
from mythos_jax.model.apply import apply
from mythos_jax.model.likelihood import forward
from mythos_jax.model.mythos import Mythos, output_table
from mythos_jax.ops.distillation import distillation
from mythos_jax.runs.state import Teacher
from mythos_jax.training.objectives import Mean, TokenLosses

_KEY = 0x7465  # of the teacher's noise, so that it is not the student's


def distilled(
    settings: DistillationConfig,
    teacher: Teacher,
    features_BTD: jax.Array,
    variables: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    mean: Mean,
) -> TokenLosses:
    """(1 - weight) times the cross-entropy of each target, plus weight temperature^2 KL(teacher || student).

    features_BTD, variables: the student's. The teacher runs all its loops, without gradient. key: for its noise.
    """
    out = apply(
        forward,
        Mythos(teacher.model),
        teacher.variables,
        batch["tokens"],
        batch.get("segment_ids"),
        teacher.model.loops,
        None,
        rngs={"state": jax.random.fold_in(key, _KEY)},
    )
    heads = (features_BTD, output_table(variables)), (out.features, output_table(teacher.variables))
    nats_BT, kl_BT = distillation(*heads, batch["targets"], batch["mask"], settings.temperature)
    minimised_BT = (1 - settings.weight) * nats_BT + settings.weight * settings.temperature**2 * kl_BT
    return TokenLosses(minimised_BT, nats_BT, {"distillation": mean(kl_BT)})
