"""What loops may share of the cache: loss and memory of every rule, decoding token by token.

    .venv/bin/python -m benchmarks.science.cache [--size gpu] [--seeds 0 1 2] [--finished]

The models are those of benchmarks.science.sampled_depth at fixed and at sampled depth, which were trained with keys and
values of their own in every loop: all rules but `all` are approximations that they have not met in training. One more
model was trained so that all loops attend to the keys and values of the first one (`loop_kv: first`), for which one
slot is exact.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.drawing import panels, save, tidy
from benchmarks.halting import measure
from benchmarks.science.frame import Arm, folder, parser_of, run_arms, save_json, spread, workdir
from benchmarks.science.sampled_depth import FIXED, SAMPLED
from benchmarks.timing import print_header, print_row
from mythos_jax.data.open import open_data
from mythos_jax.flops import cache_bytes
from mythos_jax.runs.load import load_model
from mythos_jax.sharding import use_mesh

RULES = ("all", "modulo:2", "first", "last")
DEPTHS = (FIXED.loops, 2 * FIXED.loops)
SHARED = replace(FIXED, more=(", of the first loop", ("--model.loop_kv=first",)))


def rules_of(arm: Arm) -> tuple[str, ...]:
    return ("all",) if arm is SHARED else RULES  # with one slot, all rules are the same


def decode_all(arguments: Any, arm: Arm) -> dict[str, list[list[float]]]:
    """Nats per byte of each rule: for each depth, one number per seed."""
    finished = run_arms(arguments, [arm]).get(arm.name(arguments.size), [])
    found: dict[str, list[list[float]]] = {rule: [[] for _ in DEPTHS] for rule in rules_of(arm)}
    for seed in arguments.seeds[: len(finished)]:
        loaded = load_model(workdir(arguments, arm, seed))
        batch = next(iter(open_data(loaded.config).held_out_batches(arguments.rows, arguments.rows)))
        with use_mesh(loaded.mesh):
            for rule, losses in found.items():
                for i, loops in enumerate(DEPTHS):
                    losses[i].append(measure(loaded, batch, loops, loops, None, rule).nats)
    return found


def main(words: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=128, help="held-out rows")
    arguments = parser.parse_args(words)
    columns = [f"{name}, {loops} loops" for loops in DEPTHS for name in ("bytes per token", "nats per byte")]
    print_header("model", "cache", *columns)
    figure, (axes,) = panels(1)
    results = {}
    for arm in FIXED, SAMPLED, SHARED:
        name, config = arm.name(arguments.size), arm.config(arguments.size).model
        results[name] = decode_all(arguments, arm)
        sizes = {rule: [cache_bytes(config, loops, rule) for loops in DEPTHS] for rule in results[name]}
        for rule, losses in results[name].items():
            cells = [(size, spread(np.array(at))) for size, at in zip(sizes[rule], losses, strict=True)]
            print_row(name, "first loop alone" if arm is SHARED else rule, *(cell for pair in cells for cell in pair))
        for i, loops in enumerate(DEPTHS):
            means = [np.mean(losses[i]) for losses in results[name].values()]
            at = [size[i] for size in sizes.values()]
            axes.plot(at, means, "os"[i], color=f"C{len(results) - 1}", label=f"{name}; {loops} loops")
    axes.set_xlabel("bytes of cache per token of context")
    axes.set_ylabel("held-out nats per byte")
    tidy(axes)
    save(figure, folder(arguments) / "cache.png")
    save_json(arguments, "cache", results)


if __name__ == "__main__":
    main()
