"""Reasoning tasks: the share of problems answered right, by difficulty, depth and halting. Depths and thresholds are
traced: fixed depths are one compiled program, and so is each criterion."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mythos_jax.data.placement import place_batch
from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.results import ExampleTrace, TaskResult
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.ops.chunked_argmax import chunked_argmax
from mythos_jax.sharding import replicate, use_mesh


@partial(jax.jit, static_argnames="model")
def _measured(model, variables, batch, loops, halting):
    """Of a batch: sums; of each row its loops on average over the answer; of each token its loops."""
    rngs = {"state": jax.random.key(0)}  # models that start from noise: the same at every depth
    nats_BT, out = token_loss(model, variables, batch, loops=loops, halting=halting, rngs=rngs)
    best_BT = chunked_argmax(out.features, nn.unbox(variables["params"]["embedding"]))
    right_BT = (best_BT == batch["targets"]) | ~batch["mask"]
    asked_B = batch["mask"].any(-1)
    exact = (right_BT.all(-1) & asked_B).sum()
    answer_loops_B = (out.loops * batch["mask"]).sum(-1)
    totals = exact, asked_B.sum(), nats_BT.sum(), batch["mask"].sum(), answer_loops_B.sum()
    each = answer_loops_B / jnp.maximum(batch["mask"].sum(-1), 1), out.loops
    return totals, replicate(each)


def evaluate_task(
    model: Mythos,
    variables: Any,
    batches: Mapping[int, Sequence[dict[str, np.ndarray]]],
    settings: Sequence[Setting],
    *,
    mesh: Mesh,
    progress: bool = True,
) -> tuple[list[TaskResult], list[ExampleTrace]]:
    """Exact match on the same examples at each setting, and what single examples took under each policy.

    batches: of each difficulty, numpy dicts of tokens, targets int32 [B, T] and mask [B, T] (on the answers), all of
    one shape; rows without an answer do not count.
    """
    results, taken = [], {setting: [] for setting in settings if setting.halting is not None}
    shown: dict[Setting, dict[int, tuple[np.ndarray, np.ndarray]]] = {setting: {} for setting in taken}
    count = len(settings) * sum(map(len, batches.values()))
    with use_mesh(mesh), tqdm(total=count, desc="eval", disable=not progress) as bar:
        for difficulty, parts in batches.items():
            totals = {setting: np.zeros(5) for setting in settings}
            for i, part in enumerate(parts):
                placed = place_batch(mesh, part)
                asked_B = part["mask"].any(-1)
                for setting in settings:
                    sums, each = _measured(model, variables, placed, jnp.int32(setting.loops), setting.halting)
                    totals[setting] += np.asarray(jax.device_get(sums), np.float64)
                    if setting in taken:
                        loops_B, loops_BT = jax.device_get(each)
                        taken[setting].append((difficulty, loops_B[asked_B]))
                        if i == 0:
                            length = int(np.flatnonzero(part["mask"][0]).max()) + 1
                            shown[setting][difficulty] = part["tokens"][0, :length], loops_BT[0, :length]
                    bar.update()
            for setting, (exact, asked, nats, tokens, ran) in totals.items():
                results.append(
                    TaskResult(
                        difficulty,
                        setting.loops,
                        exact / asked,
                        nats / tokens,
                        ran / tokens,
                        int(asked),
                        setting.criterion,
                        setting.threshold,
                        setting.approximate,
                    )
                )
    traces = [
        ExampleTrace(
            setting,
            np.concatenate([np.full(len(loops), difficulty) for difficulty, loops in found]),
            np.concatenate([loops for _, loops in found]),
            shown[setting],
        )
        for setting, found in taken.items()
    ]
    return results, traces
