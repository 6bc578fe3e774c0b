"""Whether a config is that of the weights that it is used with: of another model, or of a run's checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.config.model import SPEED_FIELDS
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import weight_shapes
from mythos_jax.processes import log0
from mythos_jax.typed import differences, from_dict, to_dict, upgrade


def compared(theirs: ModelConfig, ours: ModelConfig, path: str) -> dict[str, tuple[Any, Any]]:
    """The fields in which the model at a path differs from that of a config. Raises ConfigError if its weights have
    other shapes then."""
    changed = differences(to_dict(theirs), to_dict(ours), "model")
    if weight_shapes(theirs) != weight_shapes(ours):
        fields = "; ".join(f"{name} is {old!r}, not {new!r}" for name, (old, new) in changed.items())
        raise ConfigError(f"{path}: its weights do not fit this config ({fields})")
    return changed


def check_trained(file: Path, model: ModelConfig, meta: Mapping[str, Any]) -> None:
    """Says which fields of the model are not those that the checkpoint was trained with, by an edit or by damage of the
    run's config.yaml. Raises ConfigError if its weights have other shapes then."""
    trained = upgrade(ModelConfig, meta["model"])
    changed = differences(trained, to_dict(model), "model")
    fields = [
        f"{name} was {old!r} when the run was trained, is {new!r}"
        for name, (old, new) in changed.items()
        if name.removeprefix("model.") not in SPEED_FIELDS
    ]
    if fields and weight_shapes(from_dict(ModelConfig, trained)) != weight_shapes(model):
        raise ConfigError(f"{file}: is not that of the run's weights ({'; '.join(fields)})")
    for field_changed in fields:
        log0(f"{file}: {field_changed}")
