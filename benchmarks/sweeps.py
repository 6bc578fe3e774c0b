"""Quality against mean loops: every way in which a run can be stopped, and fixed depths, at equal mean loops.

    .venv/bin/python -m benchmarks.sweeps RUN [--loops 8] [--rows 256] [--budgets 1.5 2 3]

Feeds held-out rows (for a task, of each of its difficulties in training) through decoding, token by token with the
cache, under every policy that the run can follow and at many thresholds; trains the run's predictor if it has none.
Thresholds are chosen on every other row: those two whose mean loops are next to a budget, and the fractions of rows
that get the one and the other so that the budget is met. All reported numbers are of the other rows.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.halting import decode
from benchmarks.timing import print_header, print_row
from mythos_jax.data.batch import Batch
from mythos_jax.data.open import open_data
from mythos_jax.data.tasks import TaskData
from mythos_jax.model.halting import Halting
from mythos_jax.runs.load import LoadedModel, load_model
from mythos_jax.sharding import use_mesh
from mythos_jax.training.predictor import train_predictor

CHANGES = np.geomspace(0.003, 1.5, 20)  # relative changes of the state
TAIL = np.geomspace(1e-4, 0.03, 6)
CUMULATIVE = np.concatenate([TAIL, np.linspace(0.05, 0.95, 13), 1 - TAIL[::-1]])  # probabilities
FIXED = "fixed depth"


class Point(NamedTuple):
    """A policy at one threshold: means over the tokens that have a target. right: the fraction whose target is the most
    likely token."""

    loops: float
    nats: float
    right: float


class Curve(NamedTuple):
    """A policy at its thresholds, on the rows to choose on and on those to report, in the same order."""

    choice: list[Point]
    report: list[Point]

    @classmethod
    def of(cls, lists: Sequence[Sequence[Sequence[float]]]) -> "Curve":
        """From JSON."""
        return cls(*([Point(*point) for point in half] for half in lists))

    def at(self, loops: float) -> Point | None:
        """What the policy gives if it is to run so many loops on average; None outside its range."""
        order = sorted(range(len(self.choice)), key=lambda i: self.choice[i].loops)
        means = [self.choice[i].loops for i in order]
        if not means[0] - 1e-6 <= loops <= means[-1] + 1e-6:
            return None
        place = float(np.interp(loops, means, np.arange(len(means))))
        below = order[int(place)], order[min(int(place) + 1, len(order) - 1)]
        low, high = (np.array(self.report[i]) for i in below)
        return Point(*(low + (place - int(place)) * (high - low)).tolist())


def thresholds(criterion: str, depth: int) -> np.ndarray:
    """From nearly one loop to nearly all."""
    if criterion == "predicted":
        return np.maximum(np.linspace(1, 8, 15) / 8 * depth, 1)
    values = {"latent": CHANGES, "cosine": CHANGES**2 / 2, "kl": np.geomspace(1e-6, 1.0, 16)}
    return values.get(criterion, CUMULATIVE)


def criteria_of(loaded: LoadedModel) -> list[str]:
    """Fixed depths, and the criteria that the run can be halted by; a gate's last."""
    if loaded.config.model.readout == "act":
        return [FIXED, "act"]
    return [FIXED, "latent", "cosine", "kl", "predicted", *(["gate"] if loaded.config.model.exit_gate else [])]


def evaluation_rows(loaded: LoadedModel, rows: int) -> Batch:
    """Held-out rows; for a task, so many of each difficulty from 1 to the greatest in training."""
    data = open_data(loaded.config)
    if not isinstance(data, TaskData):
        return next(iter(data.held_out_batches(rows, rows)))
    difficulties = range(1, max(loaded.config.data.task.difficulty) + 1)
    batches = [batch for d in difficulties for batch in data.eval_batches(d, batch_size=rows, max_rows=rows)]
    return {name: np.concatenate([np.asarray(batch[name]) for batch in batches]) for name in batches[0]}


def measure(
    loaded: LoadedModel, rows: Batch, depth: int, loops: int, halting: Halting | None = None
) -> tuple[Point, Point]:
    """On every other row, and on the rest. depth: the most loops, for the cache."""
    with use_mesh(loaded.mesh):
        decoded = decode(loaded.model, loaded.variables, rows, jnp.int32(loops), halting, depth)
    nats_BT, loops_BT, right_BT = (np.asarray(values_TB).T for values_TB in decoded)
    mask_BT = np.asarray(rows["mask"], bool)

    def point(half: slice) -> Point:
        used_BT = mask_BT[half]
        return Point(*(float(x_BT[half][used_BT].mean(dtype=np.float64)) for x_BT in (loops_BT, nats_BT, right_BT)))

    return point(slice(0, None, 2)), point(slice(1, None, 2))


def curve(loaded: LoadedModel, rows: Batch, depth: int, criterion: str) -> Curve:
    """Of fixed depths or of a criterion, which compiles once."""
    if criterion == FIXED:
        points = [measure(loaded, rows, depth, loops) for loops in range(1, depth + 1)]
    else:
        policies = [Halting(criterion, jnp.float32(value)) for value in thresholds(criterion, depth)]
        points = [measure(loaded, rows, depth, depth, policy) for policy in policies]
    return Curve(*map(list, zip(*points, strict=True)))


def fixed_at(fixed: Curve, loops: float) -> Point:
    """What fixed depths give at these mean loops on the reported rows: some rows run one depth, the rest the next."""
    means = [point.loops for point in fixed.report]
    return Point(*(float(np.interp(loops, means, values)) for values in zip(*fixed.report, strict=True)))


def with_predictor(loaded: LoadedModel, depth: int) -> LoadedModel:
    """The run with a predictor, which is trained if there is none and the read-out allows one."""
    if loaded.config.model.readout == "act" or "predictor" in loaded.variables:
        return loaded
    train_predictor(loaded, loops=depth, progress=False)
    return replace(loaded, variables=load_model(loaded.directory).variables)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--loops", type=int, help="the full depth (default: the config's)")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows, half to choose on; for a task, of each")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.5, 2, 2.5, 3, 4, 5, 6], help="mean loops")
    arguments = parser.parse_args(words)
    loaded: Any = load_model(arguments.run)
    depth = arguments.loops or loaded.config.model.loops
    loaded = with_predictor(loaded, depth)
    rows = evaluation_rows(loaded, arguments.rows)
    curves = {criterion: curve(loaded, rows, depth, criterion) for criterion in criteria_of(loaded)}
    budgets = [budget for budget in arguments.budgets if budget < depth]
    fields = ["nats", *(["right"] if loaded.config.data.task.name else [])]
    for field in fields:
        print(f"\n{field}; mean loops that were asked for:\n")
        print_header("policy", *map(str, budgets), f"all {depth}")
        full = getattr(curves[FIXED].report[-1], field)
        for name, found in curves.items():
            points = [found.at(budget) for budget in budgets]
            print_row(name, *("" if p is None else f"{getattr(p, field):.4f}" for p in points), f"{full:.4f}")


if __name__ == "__main__":
    main()
