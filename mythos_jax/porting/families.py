"""The weight formats that are read and written, and which of them a model is in."""

from collections.abc import Iterable, Mapping
from typing import Any

from mythos_jax.errors import ConfigError
from mythos_jax.porting import huginn, native, openmythos, parcae
from mythos_jax.porting.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (native.FAMILY, openmythos.FAMILY, huginn.FAMILY, parcae.FAMILY)
}


def get_family(name: str) -> Family:
    """Raises ConfigError for an unknown name."""
    if name not in FAMILIES:
        raise ConfigError(f"format: got {name!r}, allowed: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(fields: Mapping[str, Any] | None, tensor_names: Iterable[str], where: str) -> Family:
    """The family of a model: from the field "family", else from its tensors, else from its config fields.

    fields: of its `config.json`, if it has one. Raises ConfigError, naming `where`, if nothing matches.
    """
    if fields and "family" in fields:
        if fields["family"] not in FAMILIES:
            raise ConfigError(f"{where}: family: got {fields['family']!r}, allowed: {', '.join(FAMILIES)}")
        return FAMILIES[fields["family"]]
    tensor_names = set(tensor_names)
    for family in FAMILIES.values():
        if tensor_names.issuperset(family.signature):
            return family
    # Tensors may be renamed or missing. If the config still matches a family, its table can say which ones.
    for family in FAMILIES.values():
        known = set(family.config_fields)
        if fields and known and len(known & set(fields)) > 0.7 * len(known):
            return family
    raise ConfigError(f"{where}: neither its fields nor its tensors are those of {', '.join(FAMILIES)}")
