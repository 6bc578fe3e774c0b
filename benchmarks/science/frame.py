"""What the scripts of this folder share: sizes, models and their runs, and intervals over seeds.

A script compares models that are trained on the same batches: with one seed, all get the same bytes in the same order.
Finished runs are stored in runs/science/SIZE and used by all scripts.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.runs import Losses, add_arguments, file_name, run_variants, train_and_account
from mythos_jax.config import Config, load_config

TEXT = Path(__file__).parent / "text.yaml"
Rows = dict[str, list[Losses]]


@dataclass(frozen=True)
class Size:
    """unit: channels; widths are multiples of it. fields: of text.yaml that are changed."""

    unit: int
    fields: dict[str, Any] = field(default_factory=dict)


_GPU = {
    "model.max_seq_len": 512,
    "model.n_heads": 8,
    "data.seq_len": 512,
    "data.max_bytes": 0,
    "training.batch_size": 64,
    "training.steps": 1000,
    "training.warmup_steps": 100,
}
_SMOKE = {
    "model.max_seq_len": 32,
    "model.n_heads": 2,
    "model.n_kv_heads": 1,
    "data.seq_len": 32,
    "data.max_bytes": 100_000,
    "training.batch_size": 4,
    "training.steps": 4,
    "training.warmup_steps": 2,
    "evaluation.max_rows": 16,
}
SIZES = {
    "cpu": Size(16),
    "gpu": Size(128, _GPU),
    "smoke": Size(8, _SMOKE),  # tries a script, shows nothing
}


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained. width: in units of the size. core: layers of one loop; without `loops` a plain
    transformer of `core` layers, else one with a layer before the loop and one behind it.

    experts: in place of the loop's feed-forward, of which each token is sent to two of half the width, at equal FLOPs.
    more: further overrides, with the words that name them.
    """

    width: int
    core: int
    loops: int = 0
    experts: int = 0
    rate: float = 0.04
    more: tuple[str, tuple[str, ...]] = ("", ())

    @property
    def kind(self) -> str:
        return "plain" if not self.loops else "experts" if self.experts else "looped"

    @property
    def executed(self) -> int:
        """Layers that a token runs through."""
        return 2 + self.core * self.loops if self.loops else self.core

    def name(self, size: str) -> str:
        layers = f"1 + {self.core} x {self.loops} + 1" if self.loops else f"{self.core}"
        return f"{self.kind} {self.width * SIZES[size].unit}, {layers} layers{self.more[0]}"

    def words(self, size: str) -> list[str]:
        """Overrides of text.yaml."""
        dim = self.width * SIZES[size].unit
        hidden = 11 * dim // 4
        fields: dict[str, Any] = {
            "model.dim": dim,
            "model.hidden_dim": hidden,
            "model.loop_layers": self.core,
            "model.loops": max(self.loops, 1),
            "training.muon_learning_rate": self.rate,
            "training.learning_rate": self.rate / 10,
            "evaluation.loops": [self.loops * factor // 2 for factor in (1, 2, 4, 8)] if self.loops else [1],
        }
        if not self.loops:
            fields |= {"model.prelude_layers": 0, "model.coda_layers": 0, "model.injection": "none"}
            fields |= {"model.prelude_norm": False, "model.state_norm": False}
        if self.experts:
            fields |= {"model.feed_forward": "moe", "model.n_experts": self.experts, "model.experts_per_token": 2}
            fields |= {"model.expert_dim": hidden // 2}
        fields = SIZES[size].fields | fields
        return [*(f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in fields.items()), *self.more[1]]

    def config(self, size: str) -> Config:
        return load_config(TEXT, self.words(size))


def parser_of(doc: str | None, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    add_arguments(parser, seeds=list(seeds), out=Path("runs/science"))
    return parser


def run_arms(arguments: argparse.Namespace, arms: Sequence[Arm]) -> Rows:
    """The results of each model by its name, one per seed."""
    variants = {arm.name(arguments.size): (arm.words(arguments.size), train_and_account) for arm in arms}
    place = argparse.Namespace(**{**vars(arguments), "out": folder(arguments)})
    return run_variants(place, variants, TEXT)


def folder(arguments: argparse.Namespace) -> Path:
    """Where the runs of a size are."""
    return Path(arguments.out) / arguments.size


def workdir(arguments: argparse.Namespace, arm: Arm, seed: int) -> Path:
    return folder(arguments) / f"{file_name(arm.name(arguments.size))}_{seed}"


def losses(runs: Sequence[Losses], loops: int) -> np.ndarray:
    """One number per seed."""
    return np.array([run[str(loops)] for run in runs])


def spread(values: np.ndarray, digits: int = 3) -> str:
    """A table cell: mean and sample standard deviation."""
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def interval(seeds: int, statistic: Callable[[list[int]], float]) -> tuple[float, float, float]:
    """A statistic of all seeds, and the 2.5 % and 97.5 % quantiles of the statistic of resampled seeds.

    statistic: of the indices of the seeds to use. All models are resampled together, since runs with one seed have the
    same batches. Up to 4 seeds all resamples are made, beyond that 2000 random ones. A single seed has none: NaN.
    """
    value = statistic(list(range(seeds)))
    if seeds == 1:
        return value, math.nan, math.nan
    if seeds <= 4:
        draws = [list(draw) for draw in itertools.product(range(seeds), repeat=seeds)]
    else:
        draws = np.random.default_rng(0).integers(0, seeds, (2000, seeds)).tolist()
    low, high = np.nanquantile([statistic(draw) for draw in draws], [0.025, 0.975])
    return value, float(low), float(high)


def bracket(found: tuple[float, float, float], digits: int = 2) -> str:
    """A table cell: a statistic and its interval, if there is one."""
    value, low, high = (f"{number:.{digits}f}" for number in found)
    return value if low == "nan" else f"{value} ({low} to {high})"


def save_json(arguments: argparse.Namespace, name: str, value: dict[str, Any]) -> None:
    """Writes a script's numbers and the kind of the device."""
    path = folder(arguments) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"device": jax.devices()[0].device_kind}
    path.write_text(json.dumps(about | value, indent=1) + "\n", encoding="utf-8")
