"""Which runs may be resumed: what a checkpoint stores about its run, compared with the current config and data."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mythos_jax.config import Config, DataConfig, ModelConfig, TaskConfig, TrainingConfig
from mythos_jax.config.model import SPEED_FIELDS
from mythos_jax.data.open import Data
from mythos_jax.errors import ConfigError
from mythos_jax.processes import log0
from mythos_jax.runs.base import ModelRecord, check_base, check_teacher
from mythos_jax.runs.trained_on import tokenizer_record
from mythos_jax.training.depth import curriculum_mean
from mythos_jax.training.optimizer import decay_start
from mythos_jax.typed import differences, from_dict, to_dict, upgrade

Metadata = dict[str, Any]

# Prefixes of the fields that a resume may not change: the result would be neither the old run nor a new one.
_FIXED = (
    "model.",
    "data",
    "training.batch_size",
    "training.seed",
    "training.optimizer",
    "training.ema_decay",
    # Of which weights there is a state of the optimizer.
    "training.frozen",
    "training.lora",
    "training.distillation.teacher_dtype",
    "training.objectives.exit_loss",
)
# Fields among them that affect only speed and memory.
_FREE = tuple(f"model.{name}" for name in SPEED_FIELDS)

# Fields of `training.depth` that the mean depth of a step depends on, and all such fields.
_DEPTH = ("mean_loops", "curriculum", "curriculum_steps", "curriculum_fraction")
_OF_CURRICULUM = {"training.steps", *(f"training.depth.{name}" for name in _DEPTH)}


def checkpoint_metadata(config: Config, data: Data, models: Mapping[str, ModelRecord | None] | None = None) -> Metadata:
    """What a checkpoint stores about its run, as plain containers. models: records of "base" and "teacher", the models
    that the run uses beside its own; None says nothing about them."""
    return {
        "model": to_dict(config.model),
        "training": to_dict(config.training),
        "data": data.identity,
        "tokenizer": tokenizer_record(data.tokenizer),
        **(models or {}),
    }


def check_resume(saved: Metadata, current: Metadata, workdir: Path) -> None:
    """Raises ConfigError if the run was made with another model, batch size, seed, optimizer or data."""
    changes = changed_fields(saved, current)
    refused = {k: v for k, v in changes.items() if k.startswith(_FIXED) and k not in _FREE}
    if refused:
        fields = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in refused.items())
        raise ConfigError(
            f"{workdir}: cannot resume, the run was made with other settings ({fields}); use a new --workdir"
        )
    if current.get("base"):
        check_base(saved["base"], current["base"], workdir, "--init-from")
    if "teacher" in current:
        check_teacher(saved.get("teacher"), current["teacher"], workdir)


def announce_changes(saved: Metadata, current: Metadata, step: int) -> None:
    """Prints every field that differs from the checkpoint of `step`, what another number of steps does to the learning
    rate, and where another curriculum takes up the depth."""
    changes = changed_fields(saved, current)
    for name, (old, new) in changes.items():
        note = ""
        if name == "training.steps":
            note = _schedule_note(from_dict(TrainingConfig, current["training"]), step)
        log0(f"{name} was {old!r}, is now {new!r}{note}")
    if changes.keys() & _OF_CURRICULUM:
        _announce_depth(changes, current, step)


def changed_fields(saved: Metadata, current: Metadata) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields that differ, with the saved and the current value.

    Settings that an earlier version saved are compared under their current names, with the defaults of fields that it
    did not have.
    """
    data = saved["data"]
    if isinstance(data, dict) and "task" in data:
        data = {**data, "task": upgrade(TaskConfig, data["task"])}
    upgraded = {
        "model": upgrade(ModelConfig, saved["model"]),
        "training": upgrade(TrainingConfig, saved["training"]),
        "data": data,
    }
    # The identity of the data covers its tokenizer, which checkpoints of 0.1.0 do not have as an entry of its own.
    return differences(upgraded, {name: current[name] for name in upgraded})


def _announce_depth(changes: Mapping[str, tuple[Any, Any]], current: Metadata, step: int) -> None:
    """Says what the mean depth at `step` is with another curriculum, if that changes it there or later."""
    model, training = from_dict(ModelConfig, current["model"]), from_dict(TrainingConfig, current["training"])
    fields = {name: changes[f"training.depth.{name}"][0] for name in _DEPTH if f"training.depth.{name}" in changes}
    steps = changes.get("training.steps", (training.steps,))[0]
    before = replace(training, steps=steps, depth=replace(training.depth, **fields))
    was, now = (
        float(curriculum_mean(Config(model=model, training=t, data=DataConfig(seq_len=1)), jnp.int32(step)))
        for t in (before, training)
    )
    rises = f", and rises until step {training.curriculum_length}" if training.curriculum_length > step else ""
    if was != now or (rises and before.curriculum_length != training.curriculum_length):
        log0(f"the mean depth at step {step} was {was:.3g}, is now {now:.3g}{rises}")


def _schedule_note(training: TrainingConfig, step: int) -> str:
    """How the learning rate continues after `step` when the number of steps has changed."""
    if training.schedule == "cosine":
        return f": the learning rate's cosine now ends at step {training.steps}, and is followed from step {step} on"
    if training.schedule == "wsd":
        start = decay_start(training)
        return f": the learning rate now decays from step {start} to step {training.steps}"
    return ": the learning rate does not depend on it"
