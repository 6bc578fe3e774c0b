"""A batch in the middle of generation, as pytrees that jitted functions take and return."""

from typing import Any

import jax
import numpy as np
from flax import struct

from mythos_jax.inference.sampling import Sampling
from mythos_jax.model.cache import Cache
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos


class GenerateResult(struct.PyTreeNode):
    """What was generated; columns past a row's length are 0.

    tokens: int32 [B, N], the stop token included. lengths: int32 [B], new tokens of each row, the stop token
    included. loops: int32 [B, N], loops spent on predicting each token (those that the token before it ran).
    """

    tokens: jax.Array
    lengths: jax.Array
    loops: jax.Array


class State(struct.PyTreeNode):
    """`step` tokens have been sampled in each row that is not done; all but the last of them are in the cache."""

    cache: Cache
    done_B: jax.Array
    step: jax.Array
    result: GenerateResult


class Setup(struct.PyTreeNode):
    """What stays the same from token to token. A change of a static field compiles anew."""

    model: Mythos = struct.field(pytree_node=False)
    loops: int = struct.field(pytree_node=False)
    initial_state: str | None = struct.field(pytree_node=False)
    variables: Any
    halting: Halting | None
    sampling: Sampling
    stop_tokens: jax.Array | np.ndarray  # int32 [n]


class Job(struct.PyTreeNode):
    """What generation starts from: checked arguments, an empty state, and the prompts cut into chunks.

    chunks: pairs of tokens and which of them are active, [B, C] each. max_new_tokens: N.
    """

    setup: Setup
    state: State
    chunks: list[tuple[np.ndarray, np.ndarray]]
    max_new_tokens: int = struct.field(pytree_node=False)
