"""Our own formats: parameters under their paths, and the fields of `ModelConfig`.

`mythos_jax_int8` has int8 values and scales in place of the matrices, as `load(..., weights="int8")` makes them.
"""

from collections.abc import Mapping
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.model.gather import SCALES, Weight
from mythos_jax.model.storage import boxes_by_path
from mythos_jax.porting.family import Family, parameter_shapes
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.tables import Row, quantized, rename
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


def int8_rows(config: ModelConfig) -> list[Row]:
    rows = []
    for path, box in boxes_by_path(config).items():
        if isinstance(box, Weight):
            rows.append(quantized(path, path.replace("params", SCALES, 1), path, box.inputs))
        else:
            rows.append(rename(path, path))
    return rows


FAMILY = _NativeFamily(
    name=NAME,
    rows=rows,
    to_model=to_model,
    from_model=to_dict,
    config_fields=(),
    signature=("params.embedding",),
)
INT8_FAMILY = _NativeFamily(
    name=f"{NAME}_int8",
    rows=int8_rows,
    to_model=to_model,
    from_model=to_dict,
    config_fields=(),
    signature=("params.embedding", f"{SCALES}.embedding"),
)
FAMILIES = (INT8_FAMILY, FAMILY)  # in the order in which they are detected
