"""The weight formats that are read and written, and which of them a model is in."""

from collections.abc import Iterable, Mapping
from typing import Any

from mythos_jax.errors import ConfigError
from mythos_jax.porting import huginn, llama, native, openmythos, ouro, parcae, raven
from mythos_jax.porting.family import Family

# In the order in which they are detected: those with tensors of their own before those whose tensors others have too.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(*native.FAMILIES, openmythos.FAMILY, huginn.FAMILY, parcae.FAMILY, raven.OLMO_FAMILY, raven.FAMILY),
        *(ouro.FAMILY, llama.OLMO2, llama.QWEN3, llama.QWEN2, llama.LLAMA, llama.NANBEIGE),
    )
}
ALIASES = {"raven_llama": "raven"}


def get_family(name: str) -> Family:
    """Raises ConfigError for an unknown name."""
    if name not in FAMILIES:
        raise ConfigError(f"format: got {name!r}, allowed: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(fields: Mapping[str, Any] | None, tensor_names: Iterable[str], where: str) -> Family:
    """The family of a model: from the field "family", else from "model_type", its tensors, or its config fields.

    fields: of its `config.json`, if it has one. Raises ConfigError, naming `where`, if nothing matches.
    """
    if fields and "family" in fields:
        name = fields["family"]
        name = ALIASES.get(name, name) if isinstance(name, str) else name
        if not isinstance(name, str) or name not in FAMILIES:
            raise ConfigError(f"{where}: family: got {name!r}, allowed: {', '.join(FAMILIES)}")
        return FAMILIES[name]
    if fields and (named := named_family(fields)) is not None:
        return named
    tensor_names = set(tensor_names)
    for family in FAMILIES.values():
        if _has_tensors_of(family, tensor_names):
            return family
    # Tensors may be renamed or missing. If the config still matches a family, its table can say which ones.
    for family in FAMILIES.values():
        known = set(family.config_fields)
        if fields and known and len(known & set(fields)) > 0.7 * len(known):
            return family
    raise ConfigError(f"{where}: neither its fields nor its tensors are those of {', '.join(FAMILIES)}")


def named_family(fields: Mapping[str, Any]) -> Family | None:
    """The family that "model_type" of a `config.json` names."""
    return next((family for family in FAMILIES.values() if fields.get("model_type") in family.model_types), None)


def has_signature(tensor_names: set[str]) -> bool:
    """Whether these are the names of a format's tensors."""
    return any(_has_tensors_of(family, tensor_names) for family in FAMILIES.values())


def _has_tensors_of(family: Family, tensor_names: set[str]) -> bool:
    return bool(family.signature) and tensor_names.issuperset(family.signature)
