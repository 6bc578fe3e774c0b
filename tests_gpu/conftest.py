"""These tests compile for NVIDIA GPUs with jax's CUDA plugin on a CPU; nothing runs on a GPU."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
