"""Loss on prepared rows as a function of depth and halting. Depths and thresholds are traced: all fixed depths share
one compiled program, and so do all thresholds of a criterion."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mythos_jax.data.placement import place_batch
from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.results import LoopUsage, Measurement, Sample
from mythos_jax.model.halting import Halting
from mythos_jax.model.likelihood import Forward, token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.progress import Progress
from mythos_jax.sharding import replicate, use_mesh

RECORDED_TOKENS = 2**18  # tokens whose loss and loops are recorded individually
SAMPLE_TOKENS = 600  # those of them that the heat map shows

PerToken = tuple[np.ndarray, np.ndarray]  # nats_BT, loops_BT


@partial(jax.jit, static_argnames=("model", "run"))
def _evaluate_batch(
    model: Mythos,
    variables: Any,
    batch: dict[str, jax.Array],
    loops: jax.Array,
    halting: Halting | None,
    run: Forward,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Per-batch sums over the scored tokens: their number, and by weight the nats, the loops, and the weight itself;
    and per-token nats_BT and loops_BT."""
    rngs = {"state": jax.random.key(0)}  # models that start from noise: the same noise at every depth
    nats_BT, out = token_loss(model, variables, batch, loops=loops, halting=halting, rngs=rngs, run=run)
    weight_BT = batch["mask"]
    totals = (weight_BT != 0).sum(), (nats_BT * weight_BT).sum(), (out.loops * weight_BT).sum(), weight_BT.sum()
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
    before_batch: Callable[[int], None] = lambda _: None,
) -> tuple[list[Measurement], list[LoopUsage]]:
    """Measures bits per byte and loss on the same batches under each setting, and the loops of the first 2^18 tokens
    under each halting policy.

    batches: as in data/batch.py, all of one shape. Means are weighted by the mask.
    bytes_per_token: UTF-8 bytes of the text of these targets, per target.
    before_batch: is called with the index of each batch before it is measured.
    """
    recorded_batches = max(1, RECORDED_TOKENS // batches[0]["tokens"].size)
    policies = [s for s in settings if s.halting is not None]
    deepest = max((s for s in settings if s.is_fixed_depth), key=lambda s: s.loops, default=None)
    # Tokens are ranked by their loss at the deepest fixed depth, so that depth is recorded too.
    recorded: dict[Setting, list[PerToken]] = {setting: [] for setting in policies}
    if policies and deepest is not None:
        recorded[deepest] = []
    totals = {setting: np.zeros(4) for setting in settings}

    n_calls = len(settings) * len(batches)
    with use_mesh(mesh), Progress(n_calls, "eval", "measurement", show=progress) as bar:
        for i, batch in enumerate(batches):
            before_batch(i)
            placed = place_batch(mesh, batch)
            for setting in settings:
                how = jnp.int32(setting.loops), setting.halting, setting.forward
                sums, per_token = _evaluate_batch(model, variables, placed, *how)
                totals[setting] += np.asarray(jax.device_get(sums), np.float64)
                if setting in recorded and i < recorded_batches:
                    recorded[setting].append(jax.device_get(per_token))
                bar.update()

    measurements = [_measurement(setting, *totals[setting], bytes_per_token=bytes_per_token) for setting in settings]
    targets_NT = np.concatenate([batch["targets"] for batch in batches[:recorded_batches]])
    mask_NT = np.concatenate([batch["mask"] for batch in batches[:recorded_batches]]).astype(bool)
    usage = []
    for setting in policies:
        loops_NT = np.concatenate([loops_BT for _, loops_BT in recorded[setting]])
        nats_NT = np.concatenate([nats_BT for nats_BT, _ in recorded[deepest or setting]])
        samples = _samples(targets_NT, loops_NT, nats_NT, mask_NT)
        usage.append(LoopUsage(setting, nats_NT[mask_NT], loops_NT[mask_NT], samples))
    return measurements, usage


def _measurement(
    setting: Setting, tokens: float, nats: float, loops: float, weight: float, *, bytes_per_token: float
) -> Measurement:
    loss = nats / weight
    bits = loss / math.log(2)
    return Measurement(
        setting=setting,
        metric="bits_per_byte",
        value=bits / bytes_per_token if bytes_per_token else math.nan,  # targets may have no text
        higher_is_better=False,
        mean_loops=loops / weight,
        n=int(tokens),
        loss=loss,
    )


def _samples(targets_NT: np.ndarray, loops_NT: np.ndarray, nats_NT: np.ndarray, mask_NT: np.ndarray) -> list[Sample]:
    """The first `SAMPLE_TOKENS` scored tokens, one sample per row."""
    samples: list[Sample] = []
    remaining = SAMPLE_TOKENS
    for targets_T, loops_T, nats_T, mask_T in zip(targets_NT, loops_NT, nats_NT, mask_NT, strict=True):
        scored = np.flatnonzero(mask_T)[:remaining]
        samples.append(Sample(targets_T[scored], loops_T[scored], nats_T[scored]))
        remaining -= len(scored)
        if not remaining:
            break
    return samples
