"""How the weights of a model that is not being trained are stored: in float32, in 16 bits, or as int8 with scales."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.gather import SCALES, Weight
from mythos_jax.ops.narrow import INT8_MAX
from mythos_jax.typed import check_field

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
Array = TypeVar("Array", np.ndarray, jax.Array)


@dataclass(frozen=True)
class Storage:
    """dtype: of everything with two axes or more, but the routers' and gates', whose rounding would change decisions.
    int8: the matrices that activations are multiplied with, embedding and head too, are int8 with a float32 scale per
    output channel."""

    dtype: Dtype = "float32"
    int8: bool = False

    def __post_init__(self) -> None:
        check_field(self.dtype in DTYPES, "dtype", self.dtype, ", ".join(DTYPES))

    @classmethod
    def named(cls, dtype: Dtype, weights: str | None) -> "Storage":
        """By the words of the command line. Raises ConfigError."""
        check_field(weights in (None, "int8"), "weights", weights, "int8, or none")
        return cls(dtype, int8=weights is not None)

    def __str__(self) -> str:
        return self.dtype if not self.int8 else "int8" if self.dtype == "float32" else f"int8 and {self.dtype}"

    def store(self, path: str, array: Array, box: Any) -> dict[str, Array]:
        """The variables that hold a variable of the model, by dotted path. box: of `abstract_variables`."""
        collection, name = path.split(".", 1)
        if self.int8 and isinstance(box, Weight):
            values, scale = quantize(array, box.inputs)
            return {path: values, f"{SCALES}.{name}": scale}
        decides = {"router", "halt_kernel"} & set(name.split("."))
        if collection != "params" or array.ndim < 2 or decides:
            return {path: array.astype(np.float32, copy=False)}
        if self.dtype == "float16" and array.size and float(abs(array).max()) > float(np.finfo(np.float16).max):
            raise ConfigError(f"{path}: has numbers beyond float16's largest, 65504; allowed: bfloat16")
        return {path: array.astype(DTYPES[self.dtype], copy=False)}

    def store_all(self, config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
        """All variables of a model, wherever they are; collections that are not its weights are kept."""
        boxes = boxes_by_path(config)
        stored: dict[str, Any] = {}
        for path, array in flatten_dict(dict(variables), sep=".", keep_empty_nodes=True).items():
            stored |= self.store(path, array, boxes[path]) if path in boxes else {path: array}
        return unflatten_dict(stored, sep=".")


FLOAT32 = Storage()


def boxes_by_path(config: ModelConfig) -> dict[str, Any]:
    """The boxed shapes of `abstract_variables`, by dotted path."""
    return flatten_dict(abstract_variables(config), sep=".")


def quantize(array: Array, inputs: tuple[int, ...]) -> tuple[Array, Array]:
    """int8 values and a float32 scale of size 1 along `inputs`, such that values * scale is nearest to the array.

    Symmetric: the largest element of each output channel becomes 127 or -127. Scales are rounded up to 17 significant
    bits, so that values * scale is exact, and its own quantization gives the same values and scales.
    """
    if isinstance(array, jax.Array):
        scale = _scale(jnp, array, inputs)
        return jnp.round(array.astype(jnp.float32) / scale).astype(jnp.int8), scale
    scale = _scale(np, array, inputs)
    values = np.empty(array.shape, np.int8)
    for i in range(len(array)):  # without a second array in float32 of this size
        row_scale = scale[0 if 0 in inputs else i]
        np.rint(np.asarray(array[i], np.float32) / row_scale, out=values[i], casting="unsafe")
    return values, scale


def _scale(xp: Any, array: Any, inputs: tuple[int, ...]) -> Any:
    largest, smallest = (of(axis=inputs, keepdims=True).astype(np.float32) for of in (array.max, array.min))
    scale = xp.maximum(largest, -smallest) / np.float32(INT8_MAX)
    scale = xp.where(scale > 0, scale, np.float32(1))
    return ((scale.view(np.uint32) + np.uint32(0x7F)) & np.uint32(0xFFFFFF80)).view(np.float32)
