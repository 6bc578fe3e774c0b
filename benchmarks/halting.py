"""What halting saves in decoding: loss, mean loops and time of every policy, token by token with the cache.

    python -m benchmarks.halting RUN [--loops 8] [--rows 256] [--repeats 9]

Feeds held-out text through decoding, one token at a time, as if each token had been sampled. The losses are therefore
those of the computation that is timed, also for criteria that read the logits. Thresholds are chosen on every other
row: for each policy, the one with the fewest loops whose loss is within 0.4 % of the loss at full depth. All reported
numbers are from the other rows: loss, mean loops, the loss of fixed depths at the same mean loops (between two depths,
by interpolation: some rows run one, the rest the other), and the time per token at batch 1, measured in turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.timing import median_and_range
from mythos_jax.data.batch import Batch
from mythos_jax.data.open import open_data
from mythos_jax.model.cache import init_cache
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel, load_model
from mythos_jax.sharding import use_mesh

TOLERANCE = 0.004  # of the loss at full depth
SWEEP = 20  # thresholds per policy
RANGES = {"latent": (0.01, 0.6), "cosine": (5e-5, 0.2), "kl": (3e-4, 0.3), "entropy": (3e-3, 1.0)}
TIMED_ROWS = 8


class Point(NamedTuple):
    """A policy at one threshold. nats and loops are per token."""

    threshold: float
    loops: float
    nats: float


class Report(NamedTuple):
    """A policy in the table. fixed_nats: the loss of fixed depths at the same mean loops; None for full depth."""

    point: Point
    fixed_nats: float | None
    milliseconds: list[float]  # per token, one per repeat


@partial(jax.jit, static_argnames=("model", "slots", "loop_cache"))
def decode(
    model: Mythos,
    variables: Any,
    batch: dict[str, jax.Array],
    loops: jax.Array,
    halting: Halting | None,
    slots: int,
    loop_cache: str = "all",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token, [T, B]: nats of its target, loops, and whether the target is the most likely token; by decoding
    with a cache for `slots` loops, which share its memory by this rule (`model.cache.loop_slots`)."""
    tokens_BT = batch["tokens"]

    def step(cache: Any, column: tuple[jax.Array, jax.Array]) -> tuple[Any, tuple[jax.Array, jax.Array, jax.Array]]:
        tokens_B, targets_B = column
        out: Any = model.apply(variables, tokens_B[:, None], loops=loops, halting=halting, cache=cache)
        log_p_BV = jax.nn.log_softmax(out.logits[:, 0])
        nats_B = -jnp.take_along_axis(log_p_BV, targets_B[:, None], axis=1)[:, 0]
        return out.cache, (nats_B, out.loops[:, 0], log_p_BV.argmax(-1) == targets_B)

    cache = init_cache(model.config, *tokens_BT.shape, slots, loop_cache)
    return jax.lax.scan(step, cache, (tokens_BT.T, batch["targets"].T))[1]


def measure(
    loaded: LoadedModel, batch: Batch, depth: int, loops: int, halting: Halting | None, loop_cache: str = "all"
) -> Point:
    """Means over all tokens of a batch. depth: the most loops, for the cache; loops: run by every token, or with a
    policy at most."""
    nats_TB, loops_TB, _ = decode(loaded.model, loaded.variables, batch, jnp.int32(loops), halting, depth, loop_cache)
    threshold = 0.0 if halting is None or halting.threshold is None else float(halting.threshold)
    return Point(threshold, float(np.asarray(loops_TB).mean()), float(np.asarray(nats_TB).mean()))


def thresholds(criterion: str, depth: int) -> np.ndarray:
    if criterion == "argmax":
        return np.arange(1.0, depth)
    if criterion == "predicted":
        return np.linspace(1, depth, SWEEP)
    return np.geomspace(*RANGES[criterion], SWEEP)


def criteria_of(loaded: LoadedModel) -> list[str]:
    """Those that this model can be halted by."""
    return [*RANGES, "argmax", *(["predicted"] if "predictor" in loaded.variables else [])]


def choose_policies(loaded: LoadedModel, batch: Batch, depth: int, criteria: Sequence[str]) -> dict[str, Halting]:
    """For each criterion, the threshold with the fewest loops within `TOLERANCE`; none if no threshold is."""
    bound = measure(loaded, batch, depth, depth, None).nats * (1 + TOLERANCE)
    chosen: dict[str, Halting] = {}
    for criterion in tqdm(criteria, desc="policies"):
        policies = [Halting(criterion, jnp.float32(threshold)) for threshold in thresholds(criterion, depth)]
        points = [measure(loaded, batch, depth, depth, policy) for policy in policies]
        within_tolerance = [(point.loops, i) for i, point in enumerate(points) if point.nats <= bound]
        if within_tolerance:
            chosen[criterion] = policies[min(within_tolerance)[1]]
    return chosen


def time_policies(
    loaded: LoadedModel, rows: list[Batch], depth: int, policies: dict[str, Halting | None], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds per token at batch 1, for each policy and repeat; the policies take turns."""
    tokens = sum(row["tokens"].shape[1] for row in rows)
    times: dict[str, list[float]] = {name: [] for name in policies}
    for repeat in range(repeats + 1):  # the first one compiles
        for name, halting in policies.items():
            start = time.perf_counter()
            for row in rows:
                jax.block_until_ready(decode(loaded.model, loaded.variables, row, jnp.int32(depth), halting, depth))
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start) / tokens)
    return times


def print_table(reports: dict[str, Report]) -> None:
    full = reports["full depth"]
    print(
        "| policy | threshold | mean loops | saved | nats per token | against full depth | fixed depths at its loops "
        "| ms per token, batch 1 | saved |\n" + "|---" * 9 + "|"
    )
    for name, (point, fixed_nats, times) in reports.items():
        time_saved = 1 - statistics.median(times) / statistics.median(full.milliseconds)
        print(
            f"| {name} | {point.threshold:.4g} | {point.loops:.2f} | {1 - point.loops / full.point.loops:.0%} "
            f"| {point.nats:.4f} | {point.nats / full.point.nats - 1:+.2%} "
            f"| {'' if fixed_nats is None else f'{fixed_nats:.4f}'} "
            f"| {median_and_range(times, digits=3)} | {time_saved:.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--loops", type=int, help="full depth (default: the config's)")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows: half to choose on, half to report")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    arguments = parser.parse_args()
    loaded = load_model(arguments.run)
    depth = arguments.loops or loaded.config.model.loops
    batch = next(iter(open_data(loaded.config).held_out_batches(arguments.rows, arguments.rows)))
    choice_rows, report_rows = ({name: np.asarray(x)[half::2] for name, x in batch.items()} for half in range(2))

    with use_mesh(loaded.mesh):
        chosen = choose_policies(loaded, choice_rows, depth, criteria_of(loaded))
        policies: dict[str, Halting | None] = {"full depth": None, **chosen}
        single_rows = [{name: x[i : i + 1] for name, x in report_rows.items()} for i in range(TIMED_ROWS)]
        times = time_policies(loaded, single_rows, depth, policies, arguments.repeats)
        fixed = [measure(loaded, report_rows, depth, loops, None) for loops in range(1, depth + 1)]
        reports = {"full depth": Report(fixed[-1], None, times["full depth"])}
        for name, policy in policies.items():
            if policy is not None:
                point = measure(loaded, report_rows, depth, depth, policy)
                fixed_nats = float(np.interp(point.loops, [p.loops for p in fixed], [p.nats for p in fixed]))
                reports[name] = Report(point, fixed_nats, times[name])

    print(f"fixed depths 1 to {depth}, nats per token: " + ", ".join(f"{point.nats:.4f}" for point in fixed))
    print_table(reports)
    if arguments.json:
        numbers = {
            name: {**r.point._asdict(), "fixed": r.fixed_nats, "ms": r.milliseconds} for name, r in reports.items()
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"run": arguments.run, "depth": depth, "fixed": [p._asdict() for p in fixed], **numbers}, file)


if __name__ == "__main__":
    main()
