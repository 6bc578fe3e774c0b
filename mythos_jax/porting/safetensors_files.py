"""Safetensors files, read one tensor at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.porting.layouts import Shape

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: Shape
    dtype: np.dtype


class SafetensorsFile:
    """The tensors of one `.safetensors` file. Raises ConfigError if it is not one, is truncated, or is damaged.

    fields: of the model's config, which such a file never holds.
    """

    fields: dict[str, Any] | None = None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.open("rb").close()  # its error says what is wrong; that of `safe_open` is always "No such file"
            with safe_open(self.path, framework="np") as file:
                self.tensors = {name: self._info(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ConfigError(f"{self.path}: damaged or truncated safetensors file ({one_line(error)})") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror})") from None

    def _info(self, name: str, tensor_slice: Any) -> TensorInfo:
        dtype = tensor_slice.get_dtype()
        if dtype not in DTYPES:
            raise ConfigError(f"{self.path}: {name}: dtype {dtype}, allowed: {', '.join(DTYPES)}")
        return TensorInfo(tuple(tensor_slice.get_shape()), np.dtype(DTYPES[dtype]))

    def read(self, name: str) -> np.ndarray:
        try:
            # Opened again each time: pages of a mapping that stays open count as memory in use once they are read.
            with safe_open(self.path, framework="np") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.path}: {name} cannot be read ({one_line(error)})") from None
