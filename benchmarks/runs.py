"""Runs that a benchmark compares: each trained once, its losses kept as one JSON line, and their tables."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mythos_jax.config import Config
from mythos_jax.data.open import open_data
from mythos_jax.evaluation.evaluate import evaluate_model
from mythos_jax.runs.load import load_model
from mythos_jax.training.train import train

HOUSE = Path(__file__).parents[1] / "configs" / "house_tiny.yaml"
DEPTHS = (1, 2, 4, 8, 16, 32)

Losses = dict[int | str, float]  # depth -> held-out nats per token


def slug(name: str) -> str:
    """A variant's name as a file name."""
    return re.sub(r"\W+", "_", name)


def ours(config: Config, workdir: Path) -> Losses:
    """Trains as `mythos train` does (a run that was interrupted goes on) and evaluates at `evaluation.loops`; also
    "used", the loops that contributed to a token, on average, of the deepest evaluation."""
    train(config, workdir)
    results = evaluate_model(load_model(workdir)).results
    return {**{m.setting.loops: m.loss for m in results}, "used": results[-1].mean_loops}


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, kept as JSON at `path` and read from there the next time."""
    if path.is_file():
        return json.loads(path.read_text())
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value) + "\n")
    part.rename(path)
    return json.loads(path.read_text())


def batches_of(config: Config) -> tuple[Any, list[Any]]:
    """The training batches of a config, in the order that its run sees, and its held-out ones."""
    data = open_data(config)
    held_out = list(data.held_out_batches(config.evaluation.batch_size, config.evaluation.max_rows))
    return data.train_batches(batch_size=config.training.batch_size, seed=config.training.seed), held_out


def table(rows: dict[str, list[dict[str, float]]], depths: Sequence[int]) -> str:
    """Markdown: a row per variant, mean and sample standard deviation over its seeds per depth, the best depth bold."""
    lines = ["| variant | seeds | " + " | ".join(map(str, depths)) + " |", "|---" * (len(depths) + 2) + "|"]
    for name, runs in rows.items():
        means = {d: statistics.mean(run[str(d)] for run in runs) for d in depths}
        best = min(means, key=lambda d: means[d])
        cells = []
        for d in depths:
            cell = f"{means[d]:.3f}"
            if len(runs) > 1:
                cell += f" ± {statistics.stdev(run[str(d)] for run in runs):.3f}"
            cells.append(f"**{cell}**" if d == best else cell)
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
