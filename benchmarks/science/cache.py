"""What loops may share of the cache: loss and memory of every rule, decoding token by token.

    .venv/bin/python -m benchmarks.science.cache [--size gpu] [--seeds 0 1 2] [--finished]

The models are those of benchmarks.science.sampled_depth at fixed and at sampled depth. They were trained with keys and
values of their own in every loop; all rules but `all` are approximations that they have not met in training.
"""

import numpy as np

from benchmarks.drawing import panels, save, tidy
from benchmarks.halting import measure
from benchmarks.science.frame import folder, parser_of, run_arms, save_json, spread, workdir
from benchmarks.science.sampled_depth import FIXED, SAMPLED
from benchmarks.timing import print_header, print_row
from mythos_jax.data.open import open_data
from mythos_jax.flops import cache_bytes
from mythos_jax.runs.load import load_model
from mythos_jax.sharding import use_mesh

RULES = ("all", "modulo:2", "first", "last")
DEPTHS = (FIXED.loops, 2 * FIXED.loops)


def main(words: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=128, help="held-out rows")
    arguments = parser.parse_args(words)
    found: dict[str, dict[str, list[float]]] = {}
    columns = [f"{rule}, {loops} loops" for loops in DEPTHS for rule in RULES]
    print_header("trained at", *columns)
    for arm in FIXED, SAMPLED:
        name = arm.name(arguments.size)
        finished = run_arms(arguments, [arm]).get(name, [])
        found[name] = {column: [] for column in columns}
        for seed in arguments.seeds[: len(finished)]:
            loaded = load_model(workdir(arguments, arm, seed))
            batch = next(iter(open_data(loaded.config).held_out_batches(arguments.rows, arguments.rows)))
            with use_mesh(loaded.mesh):
                for column, (loops, rule) in zip(columns, ((n, r) for n in DEPTHS for r in RULES), strict=True):
                    found[name][column].append(measure(loaded, batch, loops, loops, None, rule).nats)
        print_row(name, *(spread(np.array(values)) for values in found[name].values()))
    config = FIXED.config(arguments.size).model
    sizes = [cache_bytes(config, loops, rule) for loops in DEPTHS for rule in RULES]
    print_row("bytes per token", *sizes)
    figure, (axes,) = panels(1)
    for name, losses in found.items():
        axes.plot(sizes, [np.mean(values) for values in losses.values()], "o", label=name)
    axes.set_xlabel("bytes of cache per token of context")
    axes.set_ylabel("held-out nats per byte")
    tidy(axes)
    save(figure, folder(arguments) / "cache.png")
    save_json(arguments, "cache", {"nats": found, "bytes per token": dict(zip(columns, sizes, strict=True))})


if __name__ == "__main__":
    main()
