"""The configuration of a run: typed, frozen dataclasses that check themselves.

YAML in, command-line overrides on top, resolved YAML out. A broken rule raises `ConfigError`: one line that names the
field, what it got, and what is allowed. A comment that begins with `#:`, beside a field or above it, is the field's
description; docs/config.md is generated from them.
"""

from mythos_jax.config.data import DataConfig, EvaluationConfig, TaskConfig
from mythos_jax.config.files import load_config, load_run_config, save_config
from mythos_jax.config.model import ModelConfig
from mythos_jax.config.named import named_config
from mythos_jax.config.run import (
    Config,
    MeshConfig,
    backprop_loops,
    gathers_per_loop,
    has_static_depth,
    max_loops,
    may_skip_loops,
    mean_loops,
)
from mythos_jax.config.training import (
    DepthConfig,
    DistillationConfig,
    LocalCheckpointsConfig,
    LoraConfig,
    ObjectivesConfig,
    TrainingConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "DepthConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "LocalCheckpointsConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectivesConfig",
    "TaskConfig",
    "TrainingConfig",
    "backprop_loops",
    "gathers_per_loop",
    "has_static_depth",
    "load_config",
    "load_run_config",
    "max_loops",
    "may_skip_loops",
    "mean_loops",
    "named_config",
    "save_config",
]
