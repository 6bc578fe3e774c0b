"""Pretrained models as directories: `load_pretrained` and `save_pretrained`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mythos_jax.config import ModelConfig
from mythos_jax.porting import native
from mythos_jax.porting.coverage import require_tensors
from mythos_jax.porting.families import get_family
from mythos_jax.porting.reading import ConfigLike, FileSource, Source, VariablesSource
from mythos_jax.porting.saving import write_directory
from mythos_jax.porting.writing import SHARD_BYTES, refuse_existing
from mythos_jax.progress import Progress


def load_pretrained(
    path: str | Path, config: ConfigLike | None = None, *, host: bool = False
) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns a model's config and its variables, `{"params": …, "balance": …}` of float32 arrays, unboxed.

    path: a directory, a file of weights, or a Hugging Face id `owner/name`. The format
    (see docs/weights.md) is detected.
    config: a ModelConfig, a reference's fields, or the path of a `config.json` or of one of our YAML files. Required
    for a file that holds only tensors; elsewhere it replaces the config that comes with them.
    host: return NumPy arrays, for the caller to place, instead of jax arrays on the default device.
    Raises ConfigError, one line: nothing there, a damaged file, tensors that do not fit the config.
    """
    return load_variables(FileSource(path, config), host=host)


def load_variables(source: Source, *, host: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
    """As `load_pretrained`, from a source that is already open."""
    require_tensors(source)
    flat: dict[str, np.ndarray | jax.Array] = {}
    with Progress(len(source.table.our_shapes), "loading", "tensor") as bar:
        for path in source.table.our_shapes:
            array = np.ascontiguousarray(source.parameter(path), np.float32)
            flat[path] = array if host else jnp.asarray(array)
            bar.update()
    return source.config, unflatten_dict(flat, sep=".")


def save_pretrained(
    path: str | Path,
    model_config: ModelConfig,
    variables: Mapping[str, Any],
    format: str = native.NAME,
    *,
    tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a new directory: `config.json`, `model.safetensors`, and a copy of `tokenizer` if given.

    format: "mythos_jax", or the name of a family (docs/weights.md). Weights of more than `shard_bytes` are written as
    several files with an index. Raises ConfigError: the directory exists; the format cannot express the model (every
    reason is listed); the variables do not fit the config.
    """
    family = get_family(format)
    refuse_existing(path)
    family.require_expressible(model_config)
    source = VariablesSource(model_config, variables, "variables", tokenizer)
    require_tensors(source)
    write_directory(path, source, family, shard_bytes=shard_bytes)
