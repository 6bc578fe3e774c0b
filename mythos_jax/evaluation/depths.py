"""Loss on prepared rows as a function of depth and of halting. Depths and thresholds are traced: fixed depths are one
compiled program, and so is each criterion."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mythos_jax.data.placement import place_batch
from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.ranks import rank_correlation
from mythos_jax.evaluation.results import DepthResult, TokenTrace
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.sharding import replicate, use_mesh

KEPT_TOKENS = 2**18  # whose loss and loops are kept one by one, for ranks and the heat map


@partial(jax.jit, static_argnames="model")
def _measured(model, variables, batch, loops, halting):
    """Of a batch: sums of nats, tokens and the loops they ran; and of each token its nats and loops."""
    rngs = {"state": jax.random.key(0)}  # models that start from noise: the same at every depth
    nats_BT, out = token_loss(model, variables, batch, loops=loops, halting=halting, rngs=rngs)
    totals = nats_BT.sum(), batch["mask"].sum(), (out.loops * batch["mask"]).sum()
    return totals, replicate((nats_BT, out.loops))


def evaluate_depths(
    model: Mythos,
    variables: Any,
    batches: Sequence[dict[str, np.ndarray]],
    settings: Sequence[Setting],
    *,
    mesh: Mesh,
    bytes_per_token: float,
    progress: bool = True,
) -> tuple[list[DepthResult], list[TokenTrace]]:
    """Loss on the same batches at each setting, and what the first 2^18 tokens took under each policy.

    batches: numpy dicts of tokens, targets int32 [B, T], mask [B, T] and any segment_ids, all of one shape.
    """
    keep = max(1, KEPT_TOKENS // batches[0]["tokens"].size)
    halted = [s for s in settings if s.halting is not None]
    deepest = max((s for s in settings if s.halting is None), key=lambda s: s.loops, default=None)
    totals = {setting: np.zeros(3) for setting in settings}
    tokens: dict[Setting, list[Any]] = {setting: [] for setting in [*halted, *([deepest] if halted else [])] if setting}

    with use_mesh(mesh), tqdm(total=len(settings) * len(batches), desc="eval", disable=not progress) as bar:
        for i, batch in enumerate(batches):
            placed = place_batch(mesh, batch)
            for setting in settings:
                sums, each = _measured(model, variables, placed, jnp.int32(setting.loops), setting.halting)
                totals[setting] += np.asarray(jax.device_get(sums), np.float64)
                if setting in tokens and i < keep:
                    tokens[setting].append(jax.device_get(each))
                bar.update()

    kept = batches[:keep]
    mask_NT = np.concatenate([batch["mask"] for batch in kept]).astype(bool)
    rows_NT = np.concatenate([batch["targets"] for batch in kept])
    traces = []
    for setting in halted:
        loops_NT = np.concatenate([loops for _, loops in tokens[setting]])
        nats_NT = np.concatenate([nats for nats, _ in tokens[deepest or setting]])
        traces.append(TokenTrace(setting, rows_NT, mask_NT, loops_NT, nats_NT))
    correlations = {t.setting: rank_correlation(t.nats_NT[mask_NT], t.loops_NT[mask_NT]) for t in traces}
    results = []
    for setting in settings:
        nats, count, ran = totals[setting]
        result = DepthResult(
            setting.loops, nats / count, nats / count / math.log(2) / bytes_per_token, ran / count, int(count)
        )
        results.append(
            replace(
                result,
                halting=setting.criterion,
                threshold=setting.threshold,
                approximate=setting.approximate,
                rank_correlation=correlations.get(setting),
            )
        )
    return results, traces
