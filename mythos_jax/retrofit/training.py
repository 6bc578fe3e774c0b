"""The config that trains a retrofitted model, and what the training costs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mythos_jax.chips import CHIPS, flops_of
from mythos_jax.config import Config, ModelConfig, TrainingConfig, mean_loops
from mythos_jax.config.run import backprop_loops
from mythos_jax.flops import count_parameters, forward_flops, training_flops
from mythos_jax.typed import from_dict, to_dict

TRAINING_FILE = "train.yaml"
MOST_BACKPROP = 8  # loops with gradients, as in Huginn and in the published retrofitted models
UTILISATION = 0.4  # of a chip's peak, which well-tuned programs reach
CHIP_FLOPS = {"TPU v5e chip": CHIPS["v5e"].flops, "H100": flops_of("NVIDIA H100")}

HEADER = """\
# Trains the retrofitted model in this directory. Say what on, and go:
#
#     mythos train {file} --data.sources FILE_OR_FOLDER
#
# Fields of the model that are not here are those of `training.init_from`. See docs/retrofit.md.
"""


def training_tree(out: Path, config: ModelConfig, has_tokenizer: bool) -> dict[str, Any]:
    """A small config: the recipe of arXiv 2511.07384, at a size that shows something on one GPU in an hour."""
    out = Path(os.path.abspath(out))  # the same model from whatever directory it is trained
    mean, data = config.loops, {"path": f"data/{out.name}", "seq_len": min(1024, config.max_seq_len)}
    if has_tokenizer:
        data["tokenizer"] = str(out)
    return {
        "name": out.name,
        "training": {
            "init_from": str(out),
            "steps": 2000,
            "batch_size": 32,
            # The depth is drawn anew for each row, around a mean that rises to that of the model.
            "depth": {
                "distribution": "lognormal_poisson",
                "mean_loops": mean,
                "max_loops": max(4 * mean, mean + 2),
                "backprop_loops": min(MOST_BACKPROP, mean),
                "backprop_up_to_mean": True,
                "curriculum": "1-sqrt",
                "curriculum_fraction": 0.75,
            },
            # Muon for the matrices inside the layers, AdamW for embeddings, head and norms.
            "optimizer": "muon",
            "muon_learning_rate": 1e-3,
            "muon_shape_scaling": True,
            "learning_rate": 5e-5,
            "weight_decay": 1e-4,
            "schedule": "wsd",
            "warmup_steps": 20,
            "decay_fraction": 0.6,
            "final_learning_rate_fraction": 1e-3,
            "checkpoint_every": 200,
        },
        "data": data,
    }


def training_yaml(file: Path, tree: Mapping[str, Any]) -> bytes:
    """The config as the contents of `file`."""
    return (HEADER.format(file=file) + yaml.safe_dump(dict(tree), sort_keys=False)).encode()


@dataclass(frozen=True)
class Cost:
    """parameters: of the looped and of the dense model. forward: FLOPs per token, by loops; dense: of the dense model.
    training: FLOPs per token of training at the mean depth; dense_training: of the dense model. tokens: of the whole
    run. hours: of it on one chip, by the chip's name, at UTILISATION."""

    parameters: int
    dense_parameters: int
    forward: dict[int, int]
    dense_forward: int
    training: float
    dense_training: float
    mean_loops: int
    backprop_loops: int
    tokens: int
    hours: dict[str, float]


def training_cost(tree: Mapping[str, Any], model: ModelConfig, dense: ModelConfig, depths: tuple[int, ...]) -> Cost:
    config = from_dict(Config, {**tree, "model": to_dict(model)})
    once = replace(config, model=dense, training=TrainingConfig(batch_size=config.training.batch_size))
    per_step, context = config.training.batch_size * config.data.seq_len, config.data.seq_len // 2
    step_flops, tokens = training_flops(config), per_step * config.training.steps
    flops, dense_flops = forward_flops(model, context), forward_flops(dense, context)
    return Cost(
        parameters=count_parameters(model),
        dense_parameters=count_parameters(dense),
        forward={loops: flops.at(loops) for loops in depths},
        dense_forward=dense_flops.at(1),
        training=step_flops / per_step,
        dense_training=training_flops(once) / per_step,
        mean_loops=mean_loops(config),
        backprop_loops=backprop_loops(config),
        tokens=tokens,
        hours={
            chip: step_flops * config.training.steps / (peak * UTILISATION) / 3600 for chip, peak in CHIP_FLOPS.items()
        },
    )
