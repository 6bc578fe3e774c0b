"""What halting saves in decoding: loss, mean loops and time of every policy, token by token with the cache.

    python -m benchmarks.halting RUN [--loops 8] [--rows 256] [--repeats 9]

Feeds held-out text through decoding, one token at a time, as if each had been drawn; so the losses are those of the
very computation that is timed, also for criteria that look at the logits. Thresholds are chosen on every other row: of
each policy the one with the fewest loops whose loss is within 0.4 % of that at full depth. What is reported comes from
the other rows: loss, mean loops, the loss of fixed depths at the same mean loops (between two depths: some tokens
at one, the rest at the other), and the time of a token at batch 1, policies taking turns.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.timing import spread
from mythos_jax.data.open import open_data
from mythos_jax.model.cache import init_cache
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel, load_model
from mythos_jax.sharding import use_mesh

TOLERANCE = 0.004  # of the loss at full depth
SWEEP = 20  # thresholds a policy
RANGES = {"latent": (0.01, 0.6), "cosine": (5e-5, 0.2), "kl": (3e-4, 0.3), "entropy": (3e-3, 1.0)}


class Point(NamedTuple):
    """A policy at one threshold. nats and loops are per token."""

    threshold: float
    loops: float
    nats: float


@partial(jax.jit, static_argnames=("model", "slots"))
def decode(
    model: Mythos, variables: Any, batch: dict[str, jax.Array], loops: jax.Array, halting: Halting | None, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Nats of the targets and loops of the tokens [T, B], by decoding with a cache of `slots` loops."""
    tokens_BT = batch["tokens"]

    def step(cache, column):
        tokens_B, targets_B = column
        out = model.apply(variables, tokens_B[:, None], loops=loops, halting=halting, cache=cache)
        log_p_BV = jax.nn.log_softmax(out.logits[:, 0])
        return out.cache, (-jnp.take_along_axis(log_p_BV, targets_B[:, None], axis=1)[:, 0], out.loops[:, 0])

    cache = init_cache(model.config, *tokens_BT.shape, slots)
    return jax.lax.scan(step, cache, (tokens_BT.T, batch["targets"].T))[1]


def measure(loaded: LoadedModel, rows: list[Any], depth: int, loops: int, halting: Halting | None) -> Point:
    """Over all rows that are given."""
    found = [decode(loaded.model, loaded.variables, row, jnp.int32(loops), halting, depth) for row in rows]
    nats, ran = (np.concatenate([np.asarray(x[i]).reshape(-1) for x in found]) for i in range(2))
    return Point(0.0 if halting is None else float(halting.threshold), float(ran.mean()), float(nats.mean()))


def thresholds(criterion: str, depth: int) -> np.ndarray:
    if criterion == "argmax":
        return np.arange(1.0, depth)
    if criterion == "predicted":
        return np.linspace(1, depth, SWEEP)
    return np.geomspace(*RANGES[criterion], SWEEP)


def timed(loaded: LoadedModel, rows: list[Any], depth: int, policies: dict[str, Halting | None], repeats: int) -> dict:
    """Milliseconds a token at batch 1 of each policy: a list over repeats, the policies taking turns."""
    tokens = sum(row["tokens"].shape[1] for row in rows)
    took: dict[str, list[float]] = {name: [] for name in policies}
    for repeat in range(repeats + 1):  # the first compiles
        for name, halting in policies.items():
            start = time.perf_counter()
            for row in rows:
                jax.block_until_ready(decode(loaded.model, loaded.variables, row, jnp.int32(depth), halting, depth))
            if repeat:
                took[name].append(1e3 * (time.perf_counter() - start) / tokens)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--loops", type=int, help="full depth (default: the config's)")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows: half to choose on, half to report")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    arguments = parser.parse_args()
    loaded = load_model(arguments.run)
    depth = arguments.loops or loaded.config.model.loops
    batch = next(iter(open_data(loaded.config).held_out_batches(arguments.rows, arguments.rows)))
    choose, report = ([{name: np.asarray(x)[half::2] for name, x in batch.items()}] for half in range(2))

    criteria = [*RANGES, "argmax", *(["predicted"] if "predictor" in loaded.variables else [])]
    with use_mesh(loaded.mesh):
        fixed = {
            half: [measure(loaded, rows, depth, t, None) for t in range(1, depth + 1)]
            for half, rows in [("choose", choose), ("report", report)]
        }
        bound = fixed["choose"][-1].nats * (1 + TOLERANCE)
        chosen: dict[str, Halting] = {}
        for criterion in tqdm(criteria, desc="policies"):
            policies = [Halting(criterion, np.float32(t)) for t in thresholds(criterion, depth)]
            points = [(measure(loaded, choose, depth, depth, policy), policy) for policy in policies]
            kept = [(point.loops, i) for i, (point, _) in enumerate(points) if point.nats <= bound]
            if kept:
                chosen[criterion] = points[min(kept)[1]][1]
        singles = [{k: v[i : i + 1] for k, v in report[0].items()} for i in range(8)]
        took = timed(loaded, singles, depth, {"full depth": None, **chosen}, arguments.repeats)

        line = fixed["report"]
        rows = {"full depth": (line[-1], None)}
        for criterion, policy in chosen.items():
            point = measure(loaded, report, depth, depth, policy)
            rows[criterion] = (point, float(np.interp(point.loops, [p.loops for p in line], [p.nats for p in line])))

    full, plain = rows["full depth"][0], statistics.median(took["full depth"])
    print(f"fixed depths 1 to {depth}, nats a token: " + ", ".join(f"{p.nats:.4f}" for p in line))
    print(
        "| policy | threshold | mean loops | saved | nats a token | against full depth | fixed depths at its loops "
        "| ms a token, batch 1 | saved |\n" + "|---" * 9 + "|"
    )
    for name, (point, same) in rows.items():
        times = took[name]
        print(
            f"| {name} | {point.threshold:.4g} | {point.loops:.2f} | {1 - point.loops / full.loops:.0%} "
            f"| {point.nats:.4f} | {point.nats / full.nats - 1:+.2%} | {'' if same is None else f'{same:.4f}'} "
            f"| {spread(times, digits=3)} | {1 - statistics.median(times) / plain:.0%} |"
        )
    if arguments.json:
        numbers = {name: {**point._asdict(), "fixed": same, "ms": took[name]} for name, (point, same) in rows.items()}
        with open(arguments.json, "w") as file:
            json.dump({"run": arguments.run, "depth": depth, "fixed": [p._asdict() for p in line], **numbers}, file)


if __name__ == "__main__":
    main()
