"""The shapes of a model's variables, without the variables."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.config import ModelConfig
from mythos_jax.model.mythos import Mythos


@cache
def abstract_variables(config: ModelConfig) -> dict[str, Any]:
    """The model's variables as boxed shapes and dtypes, with their logical axes; nothing is allocated."""
    # Shapes of weights depend neither on the tokens nor on how the model is executed.
    model = Mythos(config.definition)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


def weight_shapes(config: ModelConfig) -> dict[str, Any]:
    """The shape of every variable, in a tree like theirs."""
    shapes: dict[str, Any] = jax.tree.map(lambda x: x.shape, nn.unbox(abstract_variables(config)))
    return shapes
