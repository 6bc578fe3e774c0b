"""What happens loop by loop: how far the state still moves, and which experts are chosen."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mythos_jax.data.placement import place_batch
from mythos_jax.evaluation.results import LoopTrace
from mythos_jax.model.apply import apply
from mythos_jax.model.likelihood import forward
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import Aux
from mythos_jax.sharding import replicate, use_mesh

QUANTILES = (0.1, 0.5, 0.9)


@partial(jax.jit, static_argnames=("model", "loops"))
def _change_quantiles(model: Mythos, variables: Any, batch: dict[str, jax.Array], loops: int) -> jax.Array:
    """Quantiles over the scored tokens of the relative change of the state in each loop, float32 [L, 3]."""
    change_LBT = _aux(model, variables, batch, loops).change_LBT
    assert change_LBT is not None  # loops is static, so the loop is a scan, which records every loop
    scored_LBT = jnp.where(batch["mask"] != 0, change_LBT, jnp.nan)
    return replicate(jnp.nanquantile(scored_LBT, jnp.array(QUANTILES), axis=(1, 2)).T)


@partial(jax.jit, static_argnames="model")
def _expert_load(model: Mythos, variables: Any, batch: dict[str, jax.Array], loops: jax.Array) -> jax.Array:
    """Tokens sent to each expert over all loops, float32 [loop_layers, E]."""
    return replicate(_aux(model, variables, batch, loops).expert_load)


def _aux(model: Mythos, variables: Any, batch: dict[str, jax.Array], loops: int | jax.Array) -> Aux:
    rngs = {"state": jax.random.key(0)}
    return apply(forward, model, variables, batch["tokens"], batch.get("segment_ids"), loops, None, rngs=rngs).aux


def trace_loops(model: Mythos, variables: Any, batch: dict[str, np.ndarray], loops: int, *, mesh: Mesh) -> LoopTrace:
    """Runs one batch (as for `evaluate_depths`) for `loops` loops and measures each of them."""
    expert_share_LGE = None
    with use_mesh(mesh):
        placed = place_batch(mesh, batch)
        change_L3 = jax.device_get(_change_quantiles(model, variables, placed, loops))
        if model.config.feed_forward == "moe":
            # The model returns the load summed over all its loops, so loop t is the difference between t and t - 1
            # loops. The number of loops is traced here: all of these calls share one program.
            total_LGE = np.stack(
                [jax.device_get(_expert_load(model, variables, placed, jnp.int32(n))) for n in range(1, loops + 1)]
            )
            load_LGE = np.diff(total_LGE.astype(np.float64), axis=0, prepend=0)
            expert_share_LGE = load_LGE / load_LGE.sum(-1, keepdims=True)
    return LoopTrace(int(np.count_nonzero(batch["mask"])), change_L3, expert_share_LGE)
