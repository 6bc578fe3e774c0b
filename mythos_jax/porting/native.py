"""Our own format: parameters under their paths, and the fields of `ModelConfig`."""

from collections.abc import Mapping
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting.family import Family, parameter_shapes
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.tables import Row, rename
from mythos_jax.typed import from_dict, to_dict

NAME = "mythos_jax"


class _NativeFamily(Family):
    """Its fields are those of `ModelConfig`, so it can express every model."""

    def parse_config(self, fields: Mapping[str, Any], where: str) -> ModelConfig:
        return from_dict(ModelConfig, fields)

    def config_json(
        self, config: ModelConfig, dtype: str = "float32", source_fields: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"family": self.name, **to_dict(config)}

    def inexpressible(self, config: ModelConfig) -> list[str]:
        return []


def to_model(fields: Fields) -> dict[str, Any]:
    return dict(fields.given)


def rows(config: ModelConfig) -> list[Row]:
    return [rename(path, path) for path in parameter_shapes(config)]


FAMILY = _NativeFamily(
    name=NAME,
    rows=rows,
    to_model=to_model,
    from_model=to_dict,
    config_fields=(),
    signature=("params.embedding",),
)
