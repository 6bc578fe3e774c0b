"""What foreseeing a token's depth is worth: quality against mean loops, beside the zero-shot criteria and fixed depths.

    .venv/bin/python -m benchmarks.predictor RUN [--loops 8] [--rows 512]

Trains the run's predictor where it has none yet, sweeps every policy over its threshold on held-out rows, and reads
each one's loss at the same mean loops off the line between its two nearest points. One program a policy.
"""

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.data.open import open_data
from mythos_jax.model.halting import Halting
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel, load_model
from mythos_jax.sharding import use_mesh
from mythos_jax.training.predictor import train_predictor

MOVES = np.geomspace(0.003, 1.5, 20)
THRESHOLDS = {
    "latent": MOVES,
    "cosine": MOVES**2 / 2,
    "kl": np.geomspace(1e-6, 1.0, 16),
    "predicted": np.linspace(1, 8, 15) / 8,  # of the depth
}
Point = tuple[float, float, float]  # mean loops, nats a token, share of rows with every token right


@partial(jax.jit, static_argnames="model")
def totals(model: Mythos, variables: Any, batch: Any, loops: jax.Array, halting: Halting | None) -> jax.Array:
    nats_BT, out = token_loss(model, variables, batch, loops=loops, halting=halting, rngs={"state": jax.random.key(0)})
    asked_BT = jnp.asarray(batch["mask"], bool)
    right_BT = (model.apply(variables, out.features, method="head").argmax(-1) == batch["targets"]) | ~asked_BT
    exact = right_BT.all(-1) & asked_BT.any(-1)
    return jnp.stack([(out.loops * asked_BT).sum(), nats_BT.sum(), exact.sum(), asked_BT.sum(), asked_BT.any(-1).sum()])


def measure(loaded: LoadedModel, batches: Iterable[Any], loops: int, halting: Halting | None) -> Point:
    with use_mesh(loaded.mesh):
        sums = [totals(loaded.model, loaded.variables, batch, jnp.int32(loops), halting) for batch in batches]
    ran, nats, exact, tokens, rows = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return ran / tokens, nats / tokens, exact / rows


def at(points: list[Point], budget: float, column: int) -> float | None:
    """A policy's quality at this many mean loops, between its two nearest points; None beyond its ends."""
    points = sorted(points)
    loops = [p[0] for p in points]
    if not loops[0] - 1e-6 <= budget <= loops[-1] + 1e-6:
        return None
    return float(np.interp(budget, loops, [p[column] for p in points]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--loops", type=int, help="the full depth (default: the config's)")
    parser.add_argument("--rows", type=int, default=512, help="held-out rows (a task: of each difficulty)")
    args = parser.parse_args()
    loaded = load_model(args.run)
    depth = args.loops or loaded.config.model.loops
    if "predictor" not in loaded.variables:
        train_predictor(loaded, loops=depth)
        loaded = load_model(args.run)
    data, task = open_data(loaded.config), loaded.config.data.task
    size = loaded.config.evaluation.batch_size
    if task.name:  # the difficulties of training
        batches = [b for d in task.difficulty for b in data.eval_batches(d, batch_size=size, max_rows=args.rows)]
    else:
        batches = list(data.held_out_batches(size, args.rows))

    curves = {"fixed depth": [measure(loaded, batches, loops, None) for loops in range(1, depth + 1)]}
    for criterion, thresholds in THRESHOLDS.items():
        values = thresholds * depth if criterion == "predicted" else thresholds
        curves[criterion] = [
            measure(loaded, batches, depth, Halting(criterion, max(float(t), 1.0 if criterion == "predicted" else 0.0)))
            for t in values
        ]
    print("budget -> mean loops of `predicted` on held-out rows:")
    budgets = np.maximum(THRESHOLDS["predicted"] * depth, 1)
    print(", ".join(f"{b:.1f} -> {p[0]:.2f}" for b, p in zip(budgets, curves["predicted"], strict=True)))
    columns = [b for b in (1.5, 2, 2.5, 3, 4, 5, 6) if b < depth]
    for name, column, form in [("nats a token", 1, "{:.4f}"), ("exact match", 2, "{:.1%}")][: 2 if task.name else 1]:
        print(f"\n{name}; full depth {form.format(curves['fixed depth'][-1][column])}")
        print(f"| mean loops | {' | '.join(map(str, columns))} |\n" + "|---" * (len(columns) + 1) + "|")
        for policy, points in curves.items():
            values = [at(points, b, column) for b in columns]
            print(f"| {policy} | {' | '.join('' if v is None else form.format(v) for v in values)} |")


if __name__ == "__main__":
    main()
