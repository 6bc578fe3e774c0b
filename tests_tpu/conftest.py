"""These tests compile for TPUs with libtpu on a CPU; nothing runs on a TPU."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
