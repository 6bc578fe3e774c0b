"""Configs of runs that start from a model: what they leave open about their model is as in that one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mythos_jax import config as files
from mythos_jax.config import Config, ModelConfig, load_run_config
from mythos_jax.paths import to_path

# Other rooms are imported where they are needed: most configs start from no model, and jax takes long to import.


def load_config(
    source: str | Path, overrides: Sequence[str] = (), run_dir: Callable[[str], Any] | None = None
) -> Config:
    """Reads a YAML config, as `mythos_jax.config.load_config` does. Fields of `model` that neither it nor the overrides
    give are those of the model that `training.init_from` names; of a run that has begun, its own.

    run_dir: the run directory for the name of a run; None: the run is new.
    Raises ConfigError, also for a model that cannot be read.
    """

    def start_model(name: str, init_from: str) -> ModelConfig:
        own = None if run_dir is None else run_dir(name)
        return model_of(init_from) if own is None or not has_begun(own) else model_of(own)

    return files.load_config(source, overrides, start_model)


def model_of(path: Any) -> ModelConfig:
    """The config of the model of a run, or of a pretrained model, whose weights are not read. Raises ConfigError."""
    if is_run(path):
        return load_run_config(to_path(path) / "config.yaml").model
    from mythos_jax.porting.adapted import of_base
    from mythos_jax.porting.reading import FileSource

    base = of_base(path, model_of)
    return FileSource(path).config if base is None else base


def is_run(path: str | Path) -> bool:
    """Whether this is the directory of a training run."""
    return (to_path(path) / "config.yaml").is_file()


def has_begun(run_dir: Any) -> bool:
    """Whether a run has saved a checkpoint, from which it goes on."""
    from mythos_jax.runs.checkpoints import newest_folder

    return newest_folder(run_dir / "checkpoints") is not None
