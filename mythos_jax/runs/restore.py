"""What a checkpoint of a run holds, on a mesh."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from mythos_jax.config import Config, MeshConfig, ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.processes import log0
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.runs.comparison import check_trained
from mythos_jax.runs.low_rank import abstract_low_rank
from mythos_jax.runs.records import CONFIG_FILE
from mythos_jax.sharding import default_mesh, make_mesh, placed_shapes, shardings


def restore_run(
    directory: Path, config: Config, mesh: Mesh, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The variables that a run trains, at its newest checkpoint or that of `step`: its model, or only the low-rank
    weights of a LoRA run, not scaled. Also the meta of the checkpoint, and its step.

    Raises ConfigError: no such checkpoint, a damaged one, or one of another model.
    """
    checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if not steps or step not in (None, *steps):
        allowed = ", ".join(map(str, steps)) or "none was saved yet"
        raise ConfigError(f"{directory}: no checkpoint of step {'any' if step is None else step}; allowed: {allowed}")
    step = steps[-1] if step is None else step
    like = abstract_low_rank(config, mesh) if config.training.lora.rank else _abstract_on(mesh, config.model)
    variables, meta = checkpoints.restore_variables(
        step, like, check=partial(check_trained, directory / CONFIG_FILE, config.model)
    )
    checkpoints.close()
    return variables, meta, step


def _abstract_on(mesh: Mesh, config: ModelConfig) -> dict[str, Any]:
    """The shapes, dtypes and places of a model's variables."""
    boxed = {"balance": {}, **abstract_variables(config)}
    shapes: dict[str, Any] = placed_shapes(nn.unbox(boxed), shardings(mesh, boxed))
    return shapes


def mesh_of(directory: Path, config: MeshConfig) -> Mesh:
    """The mesh that a run was trained on; the default one if that does not fit the devices that are here."""
    try:
        return make_mesh(config)
    except ConfigError:
        mesh = make_mesh(replace(default_mesh(), gather=config.gather))
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
        log0(f"mesh: that of {directory} does not fit the devices here; using {sizes}")
        return mesh
