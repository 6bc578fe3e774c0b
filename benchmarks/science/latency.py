"""Latency at equal loss: a looped model with halting, drafts and a shared cache, and plain transformers, in one run.

    .venv/bin/python -m benchmarks.science.latency [--size gpu] [--seeds 0] [--repeats 9]

Of the first seed. The looped model was trained at random depth (benchmarks.science.sampled_depth), the plain ones by
benchmarks.science.parameters. Losses are of decoding token by token with the cache and the policy that is timed;
thresholds of policies are chosen on other rows, as in benchmarks.halting. All sides generate in turns at batch 1 in one
process. What a plain transformer of equal loss takes is interpolated between the plain ones.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawing import panels, save, tidy
from benchmarks.halting import choose_policies, measure
from benchmarks.science.decoding import Side
from benchmarks.science.frame import Arm, folder, parser_of, run_arms, save_json, workdir
from benchmarks.science.parameters import PLAIN, cost_at
from benchmarks.science.sampled_depth import SAMPLED
from benchmarks.timing import Call, median_and_range, print_header, print_row, time_in_turns
from mythos_jax.data.batch import Batch
from mythos_jax.data.open import open_data
from mythos_jax.runs.load import LoadedModel, load_model
from mythos_jax.sharding import use_mesh

DRAFTS = ((1, 2), (2, 3))  # loops x tokens
COLUMNS = (
    "model", "nats per byte", "mean loops", "FLOPs per token", "ms per token", "tokens per second",
    "times plain of equal loss", "ms to the first token", "KiB",
)  # fmt: skip


def sides_of(arguments: argparse.Namespace, choice_rows: Batch, finished: dict[str, Any]) -> dict[str, Side]:
    size, seed = arguments.size, arguments.seeds[0]

    def loaded(arm: Arm) -> LoadedModel:
        return load_model(workdir(arguments, arm, seed))

    sides = {arm.name(size): Side(loaded(arm)) for arm in PLAIN if arm.name(size) in finished}
    looped, name = loaded(SAMPLED), SAMPLED.name(size)
    with use_mesh(looped.mesh):
        policies = choose_policies(looped, choice_rows, looped.config.model.loops, ("latent", "kl"))
    sides[name] = Side(looped)
    sides |= {f"{name}; {criterion}": Side(looped, policy) for criterion, policy in policies.items()}
    sides[f"{name}; last-loop cache"] = Side(looped, loop_cache="last")
    if "latent" in policies:
        sides[f"{name}; latent, last-loop cache"] = Side(looped, policies["latent"], "last")
    return sides | {f"{name}; drafts {d} x {n}": Side(looped, draft=(d, n)) for d, n in DRAFTS}


def measured(sides: dict[str, Side], rows: Batch, repeats: int) -> dict[str, dict[str, Any]]:
    """Loss, mean loops, FLOPs, memory and times of each side."""
    prompt = rows["tokens"][:1, : rows["tokens"].shape[1] // 3]
    new = rows["tokens"].shape[1] - prompt.shape[1]
    results: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        with use_mesh(side.loaded.mesh):
            point = measure(side.loaded, rows, side.loops, side.loops, side.halting, side.loop_cache)
        flops = side.flops(point.loops, side.continued(prompt, new))
        results[name] = {"nats": point.nats, "loops": point.loops, "flops": flops, "kilobytes": side.kilobytes}
    times = {}
    for count in 1, new:
        calls: dict[str, Call] = {name: partial(side.continued, prompt, count) for name, side in sides.items()}
        times[count] = time_in_turns(calls, repeats)[0]
    for name, result in results.items():
        first, whole = times[1][name], times[new][name]
        result["first_ms"] = [1e3 * seconds for seconds in first]
        result["token_ms"] = [1e3 * (b - a) / (new - 1) for a, b in zip(first, whole, strict=True)]
    return results


def show(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Prints the table, and draws loss against time."""
    plain = [(r["nats"], np.median(r["token_ms"])) for name, r in found.items() if name.startswith("plain")]
    plain_nats, plain_ms = np.array(plain).T
    print_header(*COLUMNS)
    (figure, (axes,)), marks = panels(1), iter("ov^D*PXp<>")
    for name, r in found.items():
        middle = float(np.median(r["token_ms"]))
        cells = [
            f"{r['nats']:.4f}",
            f"{r['loops']:.2f}",
            f"{r['flops']:.3g}",
            median_and_range(r["token_ms"], digits=3),
        ]
        cells += [f"{1e3 / middle:.0f}", f"{middle / cost_at(r['nats'], plain_ms, plain_nats):.2f}"]
        print_row(name, *cells, median_and_range(r["first_ms"], digits=2), f"{r['kilobytes']:.0f}")
        label = name.removesuffix(" layers") if name.startswith("plain") else name.partition("; ")[2] or "looped"
        bars = [[middle - min(r["token_ms"])], [max(r["token_ms"]) - middle]]
        look = {"fmt": "s", "color": "0.4"} if name.startswith("plain") else {"fmt": next(marks), "label": label}
        axes.errorbar([middle], [r["nats"]], xerr=bars, capsize=2, **look)
        if name.startswith("plain"):
            axes.annotate(label, (middle, r["nats"]), (5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="milliseconds per generated token (grey: plain)", ylabel="held-out nats per byte")
    tidy(axes)
    save(figure, path)


def main(words: list[str] | None = None) -> None:
    parser = parser_of(__doc__, seeds=(0,))
    parser.add_argument("--rows", type=int, default=256, help="held-out rows: half to choose on, half to report")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args(words)
    finished = run_arms(arguments, (*PLAIN, SAMPLED))
    data = open_data(load_model(workdir(arguments, SAMPLED, arguments.seeds[0])).config)
    batch = next(iter(data.held_out_batches(arguments.rows, arguments.rows)))
    choice_rows, report_rows = ({name: np.asarray(x)[half::2] for name, x in batch.items()} for half in range(2))
    found = measured(sides_of(arguments, choice_rows, finished), report_rows, arguments.repeats)
    show(found, folder(arguments) / "latency.png")
    save_json(arguments, "latency", found)


if __name__ == "__main__":
    main()
