"""Programs are compiled as users have them, with every optimization, and kept for later runs."""

import os
from pathlib import Path

import jax
import pytest

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", CACHE)


@pytest.fixture(scope="module")
def unoptimized():
    """Programs as `tests` compiles them, in half the time: for tests of what surrounds a model."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
