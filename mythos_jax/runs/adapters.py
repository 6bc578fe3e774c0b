"""The low-rank weights of a LoRA run in PEFT's format, without the model that they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_jax.config import load_run_config
from mythos_jax.errors import ConfigError
from mythos_jax.model.gather import LOW_RANK
from mythos_jax.paths import to_path
from mythos_jax.porting.layouts import Shape
from mythos_jax.porting.peft import family_for, is_adapter, write_adapter
from mythos_jax.porting.writing import refuse_existing
from mythos_jax.runs.configs import is_run
from mythos_jax.runs.records import CONFIG_FILE
from mythos_jax.runs.restore import mesh_of, restore_run

FORMAT = "peft"


@dataclass(frozen=True)
class AdapterReport:
    """tensors: shape and dtype by name. family: the format whose names they have."""

    source: str
    target: str
    family: str
    rank: int
    alpha: float
    base: str
    tensors: dict[str, tuple[Shape, str]]

    def as_text(self) -> str:
        width = max(map(len, self.tensors))
        return "\n".join(
            [
                f"{self.source} (LoRA run) -> {self.target} ({FORMAT}, names of {self.family})",
                *(f"  {name:{width}} {dtype:9} {list(shape)}" for name, (shape, dtype) in self.tensors.items()),
                f"low-rank weights: {len(self.tensors) // 2} matrices, rank {self.rank}, alpha {self.alpha:g}",
                f"base: {self.base}, which is not written",
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "source_format": "lora run",
            "target": self.target,
            "target_format": FORMAT,
            "ok": True,
            "written": True,
            "family": self.family,
            "rank": self.rank,
            "alpha": self.alpha,
            "base": self.base,
            "tensors": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in self.tensors.items()},
        }


def export_adapter(run: str, target: str, overrides: Sequence[str] = ()) -> AdapterReport:
    """Writes the low-rank weights of a run's newest checkpoint as a new PEFT directory.

    Raises ConfigError: not a LoRA run, the directory exists, a base with low-rank weights of its own, a model or a
    matrix that PEFT does not know.
    """
    refuse_existing(target)
    config = load_run_config(to_path(run) / CONFIG_FILE, overrides) if is_run(run) else None
    if config is None or not config.training.lora.rank:
        raise ConfigError(f"--to {FORMAT}: got {run}, allowed: a LoRA run, which has low-rank weights (training.lora)")
    _require_whole_base(run, config.training.init_from)
    model, lora, init_from = config.model, config.training.lora, config.training.init_from
    family = family_for(model, None, run)
    variables, _, _ = restore_run(to_path(run), config, mesh_of(to_path(run), config.mesh))
    base = str(Path(init_from).absolute()) if Path(init_from).exists() else init_from
    alpha = lora.resolved_alpha
    tensors = write_adapter(target, family, model, variables[LOW_RANK], lora.rank, alpha, base)
    return AdapterReport(run, target, family.name, lora.rank, alpha, base, tensors)


def _require_whole_base(run: str, base: str) -> None:
    """Raises ConfigError if the base has low-rank weights of its own, beside which PEFT has no others."""
    is_lora_run = is_run(base) and load_run_config(to_path(base) / CONFIG_FILE).training.lora.rank > 0
    if is_lora_run or is_adapter(base):
        what = "a LoRA run" if is_lora_run else "an adapter"
        raise ConfigError(
            f"--to {FORMAT}: got {run}, whose base {base} is {what}; allowed: a run on a whole model (mythos convert "
            f"{base} DIR merges it, before a run starts from it); mythos convert {run} DIR writes the merged model"
        )
