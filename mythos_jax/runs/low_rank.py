"""The variables of a LoRA run: low-rank weights, which it trains, beside a base, which stays as it is."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from mythos_jax.config import Config, LoraConfig
from mythos_jax.model.gather import LOW_RANK
from mythos_jax.model.low_rank import fresh_low_rank, scaled
from mythos_jax.model.storage import Storage, boxes_by_path
from mythos_jax.runs.state import Constants
from mythos_jax.sharding import abstract

# How the base is stored, by `training.lora.base_dtype`.
STORAGE = {"float32": Storage(), "bfloat16": Storage("bfloat16"), "int8": Storage(int8=True)}


def model_variables(config: Config, variables: dict[str, Any], constants: Constants) -> dict[str, Any]:
    """What the model computes with, given the variables of a state, and what is constant beside them."""
    if not config.training.lora.rank:
        return variables
    return with_low_rank(constants.base, variables[LOW_RANK], config.training.lora)


def with_low_rank(base: Mapping[str, Any], low_rank: Any, lora: LoraConfig) -> dict[str, Any]:
    """The variables of a model: the frozen ones, with low-rank weights as a run trains them."""
    return {**base, LOW_RANK: scaled(low_rank, lora.scale)}


def abstract_low_rank(config: Config, mesh: Mesh) -> dict[str, Any]:
    """The shapes, dtypes and places of the variables that a LoRA run trains."""

    def make(key: jax.Array) -> dict[str, Any]:
        return {LOW_RANK: fresh_low_rank(config.model, config.training.lora, key)}

    return abstract(make, mesh, jax.eval_shape(jax.random.key, 0))


def abstract_base(config: Config, mesh: Mesh) -> dict[str, Any]:
    """The shapes, dtypes and places of those that it leaves as they are."""
    storage = STORAGE[config.training.lora.base_dtype]

    def make() -> dict[str, Any]:
        stored: dict[str, Any] = {"balance": {}}
        for path, box in boxes_by_path(config.model).items():
            for name, x in storage.store(path, jnp.zeros(nn.unbox(box).shape), box).items():
                stored[name] = box.replace_boxed(x) if isinstance(box, nn.LogicallyPartitioned) else x
        return unflatten_dict(stored, sep=".")

    return abstract(make, mesh)
