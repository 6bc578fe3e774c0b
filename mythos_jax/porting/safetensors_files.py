"""Safetensors files, read one tensor at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.porting.tensor_info import UNKNOWN, TensorInfo

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.bool_,
    "C64": np.complex64,
}


class SafetensorsFile:
    """The tensors of one `.safetensors` file. Raises ConfigError if it is not one, is truncated, or is damaged.

    configs, notes: as in `TorchFile`; such a file never has any.
    """

    configs: Sequence[tuple[str, dict[str, Any]]] = ()
    notes: Sequence[str] = ()

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.open("rb").close()  # its error says what is wrong; that of `safe_open` is always "No such file"
            with safe_open(self.path, framework="np") as file:
                self.tensors = {name: _info(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ConfigError(f"{self.path}: damaged or truncated safetensors file ({one_line(error)})") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror})") from None

    def read(self, name: str) -> np.ndarray:
        try:
            # Opened again each time: pages of a mapping that stays open count as memory in use once they are read.
            with safe_open(self.path, framework="np") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.path}: {name} cannot be read ({one_line(error)})") from None


def _info(tensor_slice: Any) -> TensorInfo:
    shape, dtype = tuple(tensor_slice.get_shape()), tensor_slice.get_dtype()
    return TensorInfo(shape, np.dtype(DTYPES[dtype])) if dtype in DTYPES else TensorInfo(shape, UNKNOWN, dtype)
