"""What a model's source says that our config has no word for: kept, so that it comes back when the model does.

Our own format has it in two files beside the weights: the fields of the source's `config.json`, and tensors that the
original stores although it could compute them, such as its table of RoPE.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mythos_jax.errors import ConfigError
from mythos_jax.paths import read_json
from mythos_jax.porting.safetensors_files import SafetensorsFile

FIELDS_FILE = "source_config.json"
BUFFERS_FILE = "source_buffers.safetensors"


@dataclass(frozen=True)
class Origin:
    """family: the format that a model was published in; fields: of its `config.json`; buffers: its stored tables."""

    family: str
    fields: Mapping[str, Any]
    buffers: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)


def json_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the fields that a JSON file can have; one out of a checkpoint may hold anything."""
    return {name: value for name, value in fields.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def read_origin(directory: Path) -> Origin | None:
    """The origin of a model in our own format; None if it has none. Raises ConfigError if its file is damaged."""
    path, buffers_path = directory / FIELDS_FILE, directory / BUFFERS_FILE
    if not path.is_file():
        return None
    tree = read_json(path)
    family, fields = tree.get("family"), tree.get("config")
    if not isinstance(family, str) or not isinstance(fields, dict):
        raise ConfigError(f"{path}: got no family and config, allowed: an object with both")
    buffers: dict[str, Callable[[], np.ndarray]] = {}
    if buffers_path.is_file():
        file = SafetensorsFile(buffers_path)
        buffers = {name: _reader(file.read, name) for name in file.tensors}
    return Origin(family, fields, buffers)


def _reader(read: Callable[[str], np.ndarray], name: str) -> Callable[[], np.ndarray]:
    return lambda: read(name)
