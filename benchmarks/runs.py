"""Runs that a benchmark compares: each is trained once, its result is stored as JSON, and a table shows them all."""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mythos_jax.config import Config, load_config
from mythos_jax.data.batch import Batch
from mythos_jax.data.open import open_data
from mythos_jax.evaluation.evaluate import evaluate_model
from mythos_jax.flops import count_parameters, training_flops
from mythos_jax.runs.load import load_model
from mythos_jax.training.train import train

HOUSE = Path(__file__).parents[1] / "configs" / "house_tiny.yaml"
DEPTHS = (1, 2, 4, 8, 16, 32)

# depth -> held-out nats per token (as JSON, the depths are text), and what else is known of a run, by name
Losses = dict[Any, Any]
# Overrides of the config, and a function that trains in a folder and evaluates.
Variant = tuple[list[str], Callable[[Config, Path], Losses]]


def file_name(variant: str) -> str:
    """A variant's name as a file name."""
    return re.sub(r"\W+", "_", variant)


def train_and_evaluate(config: Config, workdir: Path) -> Losses:
    """Trains as `mythos train` does, resuming an interrupted run, and evaluates at `evaluation.loops`.

    Also returns "used": the mean number of loops that contributed to a token, at the greatest depth.
    """
    train(config, workdir)
    results = evaluate_model(load_model(workdir)).results
    return {**{row.setting.loops: row.loss for row in results}, "used": results[-1].mean_loops}


def train_and_account(config: Config, workdir: Path) -> Losses:
    """The same, with what the run cost and what the model weighs."""
    start = time.perf_counter()
    losses = train_and_evaluate(config, workdir)
    parameters = count_parameters(config.model)
    return {
        **losses,
        "seconds": time.perf_counter() - start,  # of the last start, if the run was interrupted; with the evaluation
        "parameters": parameters,
        "non_embedding": parameters - config.model.vocab_size * config.model.dim,  # the embedding is also the head
        "training_flops": config.training.steps * training_flops(config),
    }


def add_arguments(parser: argparse.ArgumentParser, *, seeds: list[int], out: Path) -> None:
    """The arguments that `run_variants` reads."""
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--only", default="", help="run only the variants whose name contains this")
    parser.add_argument("--finished", action="store_true", help="train nothing; show the runs that are finished")
    parser.add_argument("--out", type=Path, default=out)


def run_variants(
    arguments: argparse.Namespace, variants: Mapping[str, Variant], base: Path = HOUSE
) -> dict[str, list[Losses]]:
    """The losses of each variant of `base`, one per seed. Finished runs are read from disk, the others are trained."""
    rows: dict[str, list[Losses]] = {}
    for name, (overrides, run) in variants.items():
        if arguments.only not in name:
            continue
        words = [*overrides, "--data.path", str(arguments.out / "data")]
        results = run_seeds(base, name, words, run, arguments.seeds, arguments.out, finished=arguments.finished)
        if results:
            rows[name] = results
    if not any(arguments.only in name for name in variants):
        sys.exit(f"--only: got {arguments.only!r}, allowed: part of one of {', '.join(variants)}")
    if not rows:
        sys.exit(f"--finished: no finished runs in {arguments.out}")
    return rows


def run_seeds(
    base: Path,
    name: str,
    overrides: Sequence[str],
    run: Callable[[Config, Path], Any],
    seeds: Sequence[int],
    out: Path,
    *,
    finished: bool = False,
) -> list[Any]:
    """What `run` returns for the config `base` with each seed. Finished runs are read from `out`. finished: nothing is
    trained, and seeds are left out from the first without a result."""
    results = []
    for seed in seeds:
        config = load_config(base, [*overrides, "--training.seed", str(seed)])
        workdir = out / f"{file_name(name)}_{seed}"
        result = workdir.with_suffix(".json")
        if finished and not result.is_file():
            break  # position i of a list is the i-th seed
        results.append(stored(result, partial(run, config, workdir)))
    return results


def stored(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON at `path`; if there is none, what `make` returns, stored there first."""
    if not path.is_file():
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        incomplete = path.with_suffix(".part")
        incomplete.write_text(json.dumps(value) + "\n", encoding="utf-8")
        incomplete.rename(path)
    return json.loads(path.read_text(encoding="utf-8"))


def batches_of(config: Config) -> tuple[Any, list[Batch]]:
    """The training batches of a config, in the order of its run, and its held-out batches."""
    data = open_data(config)
    held_out = list(data.held_out_batches(config.evaluation.batch_size, config.evaluation.max_rows))
    return data.train_batches(batch_size=config.training.batch_size, seed=config.training.seed), held_out


def table(rows: dict[str, list[Losses]], depths: Sequence[int]) -> str:
    """Markdown: one row per variant, with mean and sample standard deviation over seeds per depth; best depth bold."""
    lines = ["| variant | seeds | " + " | ".join(map(str, depths)) + " |", "|---" * (len(depths) + 2) + "|"]
    for name, runs in rows.items():
        means = {depth: statistics.mean(run[str(depth)] for run in runs) for depth in depths}
        best = min(means, key=lambda depth: means[depth])
        cells = []
        for depth in depths:
            cell = f"{means[depth]:.3f}"
            if len(runs) > 1:
                cell += f" ± {statistics.stdev(run[str(depth)] for run in runs):.3f}"
            cells.append(f"**{cell}**" if depth == best else cell)
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
