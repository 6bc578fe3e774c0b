"""Reasoning tasks: the fraction of problems answered correctly, by difficulty, depth and halting. Depths and thresholds
are traced: all fixed depths share one compiled program, and so do all thresholds of a criterion."""

from collections.abc import Mapping, Sequence
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
from mythos_jax.model.mythos import Mythos, output_table
from mythos_jax.ops.chunked_argmax import chunked_argmax
from mythos_jax.progress import Progress
from mythos_jax.sharding import replicate, use_mesh


@partial(jax.jit, static_argnames=("model", "run"))
def _evaluate_batch(
    model: Mythos,
    variables: Any,
    batch: dict[str, jax.Array],
    loops: jax.Array,
    halting: Halting | None,
    run: Forward,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Per-batch sums of exact matches, problems, nats, answer tokens and their loops; per problem the mean loops of
    its answer tokens, float32 [B]; and per token its loops, int32 [B, T]."""
    rngs = {"state": jax.random.key(0)}  # models that start from noise: the same noise at every depth
    nats_BT, out = token_loss(model, variables, batch, loops=loops, halting=halting, rngs=rngs, run=run)
    best_BT = chunked_argmax(out.features, output_table(variables))
    # A problem counts as solved if each of its answer tokens is the most likely one: greedy decoding would be right.
    correct_BT = (best_BT == batch["targets"]) | (batch["mask"] == 0)
    is_problem_B = batch["mask"].any(-1)  # the last batch is padded with rows without an answer
    solved_B = correct_BT.all(-1) & is_problem_B
    answer_tokens_B = batch["mask"].sum(-1)
    answer_loops_B = (out.loops * batch["mask"]).sum(-1)
    totals = solved_B.sum(), is_problem_B.sum(), nats_BT.sum(), answer_tokens_B.sum(), answer_loops_B.sum()
    return totals, replicate((answer_loops_B / jnp.maximum(answer_tokens_B, 1), out.loops))


def evaluate_problems(
    model: Mythos,
    variables: Any,
    batches: Mapping[int, Sequence[dict[str, np.ndarray]]],
    settings: Sequence[Setting],
    *,
    mesh: Mesh,
    progress: bool = True,
) -> tuple[list[Measurement], list[LoopUsage]]:
    """Measures exact match on the same problems under each setting, and the loops of each problem under each halting
    policy.

    batches: for each difficulty, NumPy dicts of tokens and targets, int32 [B, T], and mask [B, T] (True on the
    answers), all of one shape; rows without an answer do not count.
    """
    measurements: list[Measurement] = []
    recorded: dict[Setting, _Recorder] = {s: _Recorder() for s in settings if s.halting is not None}
    n_calls = len(settings) * sum(map(len, batches.values()))
    with use_mesh(mesh), Progress(n_calls, "eval", "measurement", show=progress) as bar:
        for difficulty, batches_of_difficulty in batches.items():
            totals = {setting: np.zeros(5) for setting in settings}
            for batch in batches_of_difficulty:
                placed = place_batch(mesh, batch)
                for setting in settings:
                    how = jnp.int32(setting.loops), setting.halting, setting.forward
                    sums, loops = _evaluate_batch(model, variables, placed, *how)
                    totals[setting] += np.asarray(jax.device_get(sums), np.float64)
                    if setting in recorded:
                        recorded[setting].add(difficulty, batch, *jax.device_get(loops))
                    bar.update()
            measurements += [_measurement(setting, difficulty, *totals[setting].tolist()) for setting in settings]
    return measurements, [recorder.loop_usage(setting) for setting, recorder in recorded.items()]


class _Recorder:
    """Collects the loops of each problem under one policy, and those of each token for one problem per difficulty."""

    def __init__(self) -> None:
        self.difficulties: list[np.ndarray] = []
        self.loops: list[np.ndarray] = []
        self.samples: dict[int, Sample] = {}

    def add(self, difficulty: int, batch: dict[str, np.ndarray], loops_B: np.ndarray, loops_BT: np.ndarray) -> None:
        is_problem_B = batch["mask"].any(-1)
        self.difficulties.append(np.full(is_problem_B.sum(), difficulty))
        self.loops.append(loops_B[is_problem_B])
        if difficulty not in self.samples:
            length = int(np.flatnonzero(batch["mask"][0]).max()) + 1  # up to the last answer: the rest is padding
            self.samples[difficulty] = Sample(batch["tokens"][0, :length], loops_BT[0, :length], difficulty=difficulty)

    def loop_usage(self, setting: Setting) -> LoopUsage:
        samples = [sample for _, sample in sorted(self.samples.items())]
        return LoopUsage(setting, np.concatenate(self.difficulties), np.concatenate(self.loops), samples)


def _measurement(
    setting: Setting, difficulty: int, solved: float, problems: float, nats: float, tokens: float, loops: float
) -> Measurement:
    return Measurement(
        setting=setting,
        metric="exact_match",
        value=solved / problems,
        higher_is_better=True,
        mean_loops=loops / tokens,
        n=int(problems),
        group=difficulty,
        loss=nats / tokens,
    )
