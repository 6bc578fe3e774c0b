"""What happens loop by loop: how far the state still moves, and which experts it asks."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mythos_jax.data.placement import place_batch
from mythos_jax.model.apply import apply
from mythos_jax.model.likelihood import forward
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import Aux
from mythos_jax.sharding import replicate, use_mesh

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class LoopTrace:
    """Of one batch at a fixed depth, loop by loop.

    tokens: how many. change_L3: quantiles 0.1, 0.5, 0.9 over the tokens of |h_t - h_(t-1)| / |h_t|.
    expert_share_LGE: share of the tokens' choices that each expert of each layer in the loop gets; None where dense.
    """

    tokens: int
    change_L3: np.ndarray
    expert_share_LGE: np.ndarray | None


@partial(jax.jit, static_argnames=("model", "loops"))
def _changes(model, variables, batch, loops):
    change_LBT = jnp.where(batch["mask"], _aux(model, variables, batch, loops).change_LBT, jnp.nan)
    return replicate(jnp.nanquantile(change_LBT, jnp.array(QUANTILES), axis=(1, 2)).T)


@partial(jax.jit, static_argnames="model")
def _load(model, variables, batch, loops):
    return replicate(_aux(model, variables, batch, loops).expert_load)


def _aux(model: Mythos, variables: Any, batch: dict[str, jax.Array], loops: int | jax.Array) -> Aux:
    rngs = {"state": jax.random.key(0)}
    return apply(forward, model, variables, batch["tokens"], batch.get("segment_ids"), loops, None, rngs=rngs).aux


def trace_loops(model: Mythos, variables: Any, batch: dict[str, np.ndarray], loops: int, *, mesh: Mesh) -> LoopTrace:
    """One batch (as `evaluate_depths` takes) at `loops` loops, seen from inside."""
    shares = None
    with use_mesh(mesh):
        placed = place_batch(mesh, batch)
        change_L3 = jax.device_get(_changes(model, variables, placed, loops))
        if model.config.feed_forward == "moe":
            # The model counts over all loops so far: what loop t adds is what t loops have over t - 1.
            total_LGE = np.stack(
                [jax.device_get(_load(model, variables, placed, jnp.int32(n))) for n in range(1, loops + 1)]
            )
            load_LGE = np.diff(total_LGE.astype(np.float64), axis=0, prepend=0)
            shares = load_LGE / load_LGE.sum(-1, keepdims=True)
    return LoopTrace(int(batch["mask"].sum()), change_L3, shares)
