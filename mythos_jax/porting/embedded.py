"""The model's config among what a trainer saved beside the weights."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.porting.families import detect
from mythos_jax.typed import to_dict

FEWEST_FIELDS = 5  # of a model's config; settings of a training may share some names with it


def embedded_fields(
    path: Path, candidates: Iterable[tuple[str, Mapping[str, Any]]], tensor_names: Collection[str]
) -> Mapping[str, Any] | None:
    """The first candidate that is a config of the family whose tensors these are; None if there is none.

    candidates: each with the name of its place. Raises ConfigError for one of which most fields are such a
    config's, but which asks for what is not supported. Others, such as settings of the training, are passed over.
    """
    refused = None
    for place, fields in candidates:
        try:
            family = detect(fields, tensor_names, str(path))
        except ConfigError:
            continue
        known = set(family.config_fields or to_dict(ModelConfig())) & set(fields)
        if len(known) < FEWEST_FIELDS:
            continue
        try:
            family.model_config(fields, f"{path}: {place}")
            return fields
        except ConfigError as error:
            if len(known) >= len(fields) / 2:
                refused = refused or error
    if refused is not None:
        raise refused
    return None
