"""Pretrained models as directories: `load_pretrained` and `save_pretrained`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mythos_jax.config import ModelConfig
from mythos_jax.model.gather import SCALES
from mythos_jax.model.storage import FLOAT32, Dtype, Storage, boxes_by_path
from mythos_jax.porting import native
from mythos_jax.porting.adapted import open_pretrained
from mythos_jax.porting.coverage import require_tensors
from mythos_jax.porting.families import get_family
from mythos_jax.porting.reading import ConfigLike, Source, VariablesSource
from mythos_jax.porting.saving import write_directory
from mythos_jax.porting.writing import SHARD_BYTES, refuse_existing
from mythos_jax.progress import Progress


def load_pretrained(
    path: str | Path, config: ConfigLike | None = None, *, dtype: Dtype = "float32", int8: bool = False
) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns a model's config and its variables, `{"params": …, "balance": …}`, unboxed, on the default device.

    path: a directory, a file of weights, or a Hugging Face id `owner/name`. The format (see docs/weights.md) is
    detected; low-rank weights in PEFT's format are added to the model that they were trained on.
    config: a ModelConfig, a reference's fields, or the path of a `config.json` or of one of our YAML files. Required
    for a file that holds only tensors; elsewhere it replaces the config that comes with them.
    dtype, int8: how the weights are stored, see `Storage`; as int8, there is a collection `scales` beside the params.
    Raises ConfigError, one line: nothing there, a damaged file, tensors that do not fit the config.
    """
    return load_variables(open_pretrained(path, config), Storage(dtype, int8))


def load_variables(
    source: Source, storage: Storage = FLOAT32, put: Callable[[str, np.ndarray], Any] | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """As `load_pretrained`, from a source that is already open.

    put: places the variable at a dotted path, such as `params.embedding` (default: on the default device). Each tensor
    is read, stored as `storage` says, and placed before the next is read, so that host memory holds one at a time.
    """
    require_tensors(source)
    boxes = boxes_by_path(source.config)
    flat: dict[str, Any] = {}
    with Progress(len(source.table.our_shapes), "loading", "tensor") as bar:
        for path in source.table.our_shapes:
            stored = storage.store(path, source.parameter(path), boxes[path])
            for name, array in stored.items():
                flat[name] = jnp.asarray(array) if put is None else put(name, array)
            bar.update()
    return source.config, unflatten_dict(flat, sep=".")


def save_pretrained(
    path: str | Path,
    model_config: ModelConfig,
    variables: Mapping[str, Any],
    format: str | None = None,
    *,
    tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a new directory: `config.json`, `model.safetensors`, and a copy of `tokenizer` if given.

    format: the name of a format (docs/weights.md); default: ours, "mythos_jax", or "mythos_jax_int8" for variables that
    are int8. Weights of more than `shard_bytes` are written as
    several files with an index. Raises ConfigError: the directory exists; the format cannot express the model (every
    reason is listed); the variables do not fit the config.
    """
    family = get_family(format or (native.INT8_FAMILY if SCALES in variables else native.FAMILY).name)
    refuse_existing(path)
    family.require_expressible(model_config)
    source = VariablesSource(model_config, variables, "variables", tokenizer)
    require_tensors(source)
    write_directory(path, source, family, shard_bytes=shard_bytes)
