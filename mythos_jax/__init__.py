"""mythos_jax: recurrent-depth transformers in JAX and Flax.

The public names, imported when first used: the model needs jax and flax alone, and asks for nothing else.
"""

import importlib

from mythos_jax.version import __version__

_HOME = {
    "Halting": "model.halting",
    "ModelConfig": "config",
    "Mythos": "model.mythos",
    "generate": "inference.generate",
    "load_config": "config",
    "load_pretrained": "porting.pretrained",
    "save_pretrained": "porting.pretrained",
    "train": "training.train",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mythos_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mythos_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value
