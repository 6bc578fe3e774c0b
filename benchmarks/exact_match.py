"""Runs on reasoning tasks that a benchmark compares, and their exact match by difficulty and loops."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.runs import run_seeds
from mythos_jax.config import Config
from mythos_jax.evaluation.evaluate import evaluate_model
from mythos_jax.runs.load import load_model
from mythos_jax.training.train import train

TASKS = Path(__file__).parents[1] / "configs" / "tasks"
# Overrides with which a run on any task takes a moment and shows nothing.
SMOKE = (
    *("--model.dim=16", "--model.hidden_dim=16", "--training.steps=2", "--training.warmup_steps=1"),
    *("--training.batch_size=4", "--evaluation.batch_size=4", "--evaluation.max_rows=4"),
)
Results = list[dict[str, Any]]  # of one run
Arm = TypeVar("Arm")


def run(config: Config, workdir: Path) -> Results:
    """Trains, and returns the exact match by difficulty and loops."""
    train(config, workdir)
    results = evaluate_model(load_model(workdir)).results
    return [{"difficulty": row.group, "loops": row.setting.loops, "exact_match": row.value} for row in results]


def run_arms(
    arguments: argparse.Namespace, task: str, arms: Mapping[Arm, tuple[str, Sequence[str]]], out: Path
) -> dict[Arm, list[Results]]:
    """The results of each arm that `arguments` choose (`runs.add_arguments`): its name and overrides by arm."""
    chosen = {arm: (name, overrides) for arm, (name, overrides) in arms.items() if arguments.only in name}
    runs = {
        arm: run_seeds(TASKS / f"{task}.yaml", name, overrides, run, arguments.seeds, out, finished=arguments.finished)
        for arm, (name, overrides) in chosen.items()
    }
    runs = {arm: results for arm, results in runs.items() if results}
    if not runs:
        names = ", ".join(name for name, _ in arms.values())
        sys.exit(f"--only, --finished: no run is left in {out} of {names}")
    return runs


def exact_match(runs: Sequence[Results], difficulty: int, loops: int) -> np.ndarray:
    """One number per seed, in percent."""
    results = [result for results in runs for result in results]
    selected = [r for r in results if (r["difficulty"], r["loops"]) == (difficulty, loops)]
    return np.array([100 * result["exact_match"] for result in selected])
