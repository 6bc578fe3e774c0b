"""Runs on reasoning tasks that a benchmark compares, and their exact match by difficulty and loops."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import file_name, stored
from mythos_jax.config import Config, load_config
from mythos_jax.evaluation.evaluate import evaluate_model
from mythos_jax.runs.load import load_model
from mythos_jax.training.train import train

TASKS = Path(__file__).parents[1] / "configs" / "tasks"
Results = list[dict[str, Any]]  # of one run


def run(config: Config, workdir: Path) -> Results:
    """Trains, and returns the exact match by difficulty and loops."""
    train(config, workdir)
    results = evaluate_model(load_model(workdir)).results
    return [{"difficulty": row.group, "loops": row.setting.loops, "exact_match": row.value} for row in results]


def run_seeds(task: str, name: str, overrides: Sequence[str], seeds: Sequence[int], out: Path) -> list[Results]:
    """The results of a config of configs/tasks, one per seed. Finished runs are read from `out`."""
    results = []
    for seed in seeds:
        config = load_config(TASKS / f"{task}.yaml", [*overrides, "--training.seed", str(seed)])
        workdir = out / f"{file_name(name)}_{seed}"
        results.append(stored(workdir.with_suffix(".json"), partial(run, config, workdir)))
    return results


def exact_match(runs: Sequence[Results], difficulty: int, loops: int) -> np.ndarray:
    """One number per seed, in percent."""
    results = [result for results in runs for result in results]
    selected = [r for r in results if (r["difficulty"], r["loops"]) == (difficulty, loops)]
    return np.array([100 * result["exact_match"] for result in selected])
