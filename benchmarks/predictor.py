"""What predicting a token's depth is worth: quality against mean loops, for zero-shot criteria and fixed depths too.

    .venv/bin/python -m benchmarks.predictor RUN [--loops 8] [--rows 512]

Trains the run's predictor if it has none, sweeps the threshold of every policy on held-out rows, and interpolates each
policy's loss at the same mean loops. Each policy compiles once.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.data.batch import Batch
from mythos_jax.data.open import open_data
from mythos_jax.data.tasks import TaskData
from mythos_jax.model.halting import Halting
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel, load_model
from mythos_jax.sharding import use_mesh
from mythos_jax.training.predictor import train_predictor

CHANGES = np.geomspace(0.003, 1.5, 20)  # relative changes of the state
THRESHOLDS = {
    "latent": CHANGES,
    "cosine": CHANGES**2 / 2,
    "kl": np.geomspace(1e-6, 1.0, 16),
    "predicted": np.linspace(1, 8, 15) / 8,  # as a fraction of the depth
}
BUDGETS = (1.5, 2, 2.5, 3, 4, 5, 6)  # columns of the table: mean loops


class Point(NamedTuple):
    """A policy at one threshold."""

    mean_loops: float
    nats: float  # per token
    exact_match: float  # fraction of the rows in which every token is right


@partial(jax.jit, static_argnames="model")
def totals(model: Mythos, variables: Any, batch: Any, loops: jax.Array, halting: Halting | None) -> jax.Array:
    """Sums over a batch, float32 [5]: loops, nats, rows that match exactly, tokens, rows."""
    nats_BT, out = token_loss(model, variables, batch, loops=loops, halting=halting, rngs={"state": jax.random.key(0)})
    mask_BT = jnp.asarray(batch["mask"], bool)
    logits_BTV: Any = model.apply(variables, out.features, method="head")
    right_BT = (logits_BTV.argmax(-1) == batch["targets"]) | ~mask_BT
    exact_B = right_BT.all(-1) & mask_BT.any(-1)
    return jnp.stack([(out.loops * mask_BT).sum(), nats_BT.sum(), exact_B.sum(), mask_BT.sum(), mask_BT.any(-1).sum()])


def measure(loaded: LoadedModel, batches: Sequence[Batch], loops: int, halting: Halting | None) -> Point:
    with use_mesh(loaded.mesh):
        sums = [totals(loaded.model, loaded.variables, batch, jnp.int32(loops), halting) for batch in batches]
    all_loops, nats, exact, tokens, rows = np.asarray(jax.device_get(sums), np.float64).sum(axis=0).tolist()
    return Point(all_loops / tokens, nats / tokens, exact / rows)


def interpolate(points: list[Point], budget: float, quality: Callable[[Point], float]) -> float | None:
    """A policy's quality at a number of mean loops, between its two nearest points; None outside their range."""
    points = sorted(points)
    loops = [point.mean_loops for point in points]
    if not loops[0] - 1e-6 <= budget <= loops[-1] + 1e-6:
        return None
    return float(np.interp(budget, loops, [quality(point) for point in points]))


def evaluation_batches(loaded: LoadedModel, rows: int) -> list[Batch]:
    """Held-out rows; for a task, `rows` of each difficulty in training."""
    data, size = open_data(loaded.config), loaded.config.evaluation.batch_size
    if not isinstance(data, TaskData):
        return list(data.held_out_batches(size, rows))
    difficulties = loaded.config.data.task.difficulty
    return [batch for d in difficulties for batch in data.eval_batches(d, batch_size=size, max_rows=rows)]


def sweep(loaded: LoadedModel, batches: Sequence[Batch], depth: int) -> dict[str, list[Point]]:
    """The points of fixed depths and of every policy."""
    curves = {"fixed depth": [measure(loaded, batches, loops, None) for loops in range(1, depth + 1)]}
    for criterion, thresholds in THRESHOLDS.items():
        values = predicted_budgets(depth) if criterion == "predicted" else thresholds
        policies = [Halting(criterion, float(value)) for value in values]
        curves[criterion] = [measure(loaded, batches, depth, policy) for policy in policies]
    return curves


def predicted_budgets(depth: int) -> np.ndarray:
    return np.maximum(THRESHOLDS["predicted"] * depth, 1)


def print_table(
    title: str, curves: dict[str, list[Point]], depth: int, quality: Callable[[Point], float], form: str
) -> None:
    budgets = [budget for budget in BUDGETS if budget < depth]
    print(f"\n{title}; full depth {form.format(quality(curves['fixed depth'][-1]))}")
    print(f"| mean loops | {' | '.join(map(str, budgets))} |\n" + "|---" * (len(budgets) + 1) + "|")
    for policy, points in curves.items():
        values = [interpolate(points, budget, quality) for budget in budgets]
        print(f"| {policy} | {' | '.join('' if value is None else form.format(value) for value in values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--loops", type=int, help="the full depth (default: the config's)")
    parser.add_argument("--rows", type=int, default=512, help="held-out rows; for a task, per difficulty")
    args = parser.parse_args()
    loaded = load_model(args.run)
    depth = args.loops or loaded.config.model.loops
    if "predictor" not in loaded.variables:
        train_predictor(loaded, loops=depth)
        loaded = load_model(args.run)

    curves = sweep(loaded, evaluation_batches(loaded, args.rows), depth)
    print("budget -> mean loops of `predicted` on held-out rows:")
    budgets = zip(predicted_budgets(depth), curves["predicted"], strict=True)
    print(", ".join(f"{budget:.1f} -> {point.mean_loops:.2f}" for budget, point in budgets))
    print_table("nats per token", curves, depth, lambda point: point.nats, "{:.4f}")
    if loaded.config.data.task.name:
        print_table("exact match", curves, depth, lambda point: point.exact_match, "{:.1%}")


if __name__ == "__main__":
    main()
