"""mythos_jax: recurrent-depth transformers in JAX and Flax.

These are the public names. Each is imported when it is first used, so that `import mythos_jax` is cheap and the model
needs no more than jax and flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mythos_jax.version import __version__

if TYPE_CHECKING:  # for editors and type checkers
    from mythos_jax.config import (
        Config,
        DataConfig,
        EvaluationConfig,
        MeshConfig,
        ModelConfig,
        TrainingConfig,
    )
    from mythos_jax.inference.generate import generate, stream
    from mythos_jax.inference.speculative import speculate
    from mythos_jax.language_model import LanguageModel, evaluate, load
    from mythos_jax.model.cache import init_cache
    from mythos_jax.model.halting import Halting
    from mythos_jax.model.mythos import Mythos
    from mythos_jax.porting.pretrained import load_pretrained, save_pretrained
    from mythos_jax.runs.configs import load_config
    from mythos_jax.training.train import train

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "Halting",
    "LanguageModel",
    "MeshConfig",
    "ModelConfig",
    "Mythos",
    "TrainingConfig",
    "__version__",
    "evaluate",
    "generate",
    "init_cache",
    "load",
    "load_config",
    "load_pretrained",
    "save_pretrained",
    "speculate",
    "stream",
    "train",
]

_MODULES = {
    "Config": "config",
    "DataConfig": "config",
    "EvaluationConfig": "config",
    "Halting": "model.halting",
    "LanguageModel": "language_model",
    "MeshConfig": "config",
    "ModelConfig": "config",
    "Mythos": "model.mythos",
    "TrainingConfig": "config",
    "evaluate": "language_model",
    "generate": "inference.generate",
    "init_cache": "model.cache",
    "load": "language_model",
    "load_config": "runs.configs",
    "load_pretrained": "porting.pretrained",
    "save_pretrained": "porting.pretrained",
    "speculate": "inference.speculative",
    "stream": "inference.generate",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mythos_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mythos_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
