"""What `import mythos_jax` gives, and what it does not pull in."""

import subprocess
import sys

import pytest

import mythos_jax


def test_public_names():
    for name in mythos_jax.__all__:
        value = getattr(mythos_jax, name)
        assert name == "__version__" or value.__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mythos_jax.nothing


def test_model_and_training_step_need_only_jax_flax_and_optax():
    code = """
import sys
for name in "grain orbax orbax.checkpoint torch array_record tokenizers pyarrow matplotlib tqdm".split():
    sys.modules[name] = None  # importing it raises
from mythos_jax import Mythos, ModelConfig, Halting, load_config, generate
import mythos_jax.training.step
"""
    subprocess.run([sys.executable, "-c", code], check=True)
