"""Loss as a function of depth, by one jitted function: the number of loops is traced, so it compiles once."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mythos_jax.model.halting import Halting
from mythos_jax.model.likelihood import next_token_nats
from mythos_jax.model.mythos import Mythos
from mythos_jax.sharding import batch_sharding, local_rows, to_global, use_mesh


@partial(jax.jit, static_argnames="model")
def _totals(model, variables, batch, loops, halting):
    """Sums over a batch: nats, tokens, and the loops they ran."""
    rngs = {"state": jax.random.key(0)}  # models that start from noise: the same at every depth
    nats_BT, out = next_token_nats(model, variables, batch, loops=loops, halting=halting, rngs=rngs)
    return nats_BT.sum(), batch["mask"].sum(), (out.loops * batch["mask"]).sum()


@dataclass(frozen=True)
class DepthResult:
    """One row of the table. loss: nats per token; mean_loops: over the tokens, what was run and contributed."""

    loops: int
    loss: float
    bits_per_byte: float
    mean_loops: float
    tokens: int


def evaluate_depths(
    model: Mythos,
    variables: Any,
    batches: Sequence[dict[str, np.ndarray]],
    loops: Iterable[int],
    *,
    mesh: Mesh,
    bytes_per_token: float,
    halting: Halting | None = None,
    progress: bool = True,
) -> list[DepthResult]:
    """Loss on the same batches at each number of loops (with a halting policy: at most so many).

    batches: numpy dicts of tokens, targets int32 [B, T], mask [B, T] and any segment_ids, all of one shape.
    """
    sharding, size = batch_sharding(mesh), batches[0]["tokens"].shape[0]
    rows = local_rows(sharding, size)

    depths = list(loops)
    results = []
    with use_mesh(mesh), tqdm(total=len(depths) * len(batches), desc="eval", disable=not progress) as bar:
        for depth in depths:
            parts = []
            for batch in batches:
                batch = to_global(sharding, size, rows, {name: values[rows] for name, values in batch.items()})
                parts.append(_totals(model, variables, batch, jnp.int32(depth), halting))
                bar.update()
            nats, tokens, ran = np.sum(jax.device_get(parts), axis=0, dtype=np.float64)
            loss = float(nats / tokens)
            results.append(
                DepthResult(depth, loss, loss / math.log(2) / bytes_per_token, float(ran / tokens), int(tokens))
            )
    return results


def default_depths(trained: int) -> list[int]:
    """Powers of two up to twice the trained depth, and the trained depth itself."""
    powers = [2**i for i in range((2 * trained).bit_length())]
    return sorted({*(p for p in powers if p <= 2 * trained), trained})
