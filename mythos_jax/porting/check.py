"""Comparing the PyTorch original with our model on the same tokens (`mythos convert --check`)."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting import native
from mythos_jax.porting.pretrained import load_variables
from mythos_jax.porting.reading import Source

TOLERANCE = 1e-4
INSTALL = "pip install torch transformers, then pip install --no-deps open-mythos==0.5.0"

Logits = Callable[[np.ndarray, int], np.ndarray]  # tokens [B, T] and the number of loops -> logits [B, T, V]


@dataclass(frozen=True)
class Check:
    """max_abs_difference: the largest difference of a float32 logit over all tokens, by number of loops.
    greedy_agree: whether both models continue a prompt with the same `greedy_tokens` tokens."""

    max_abs_difference: dict[int, float]
    greedy_tokens: int
    greedy_agree: bool

    @property
    def ok(self) -> bool:
        return self.greedy_agree and max(self.max_abs_difference.values()) <= TOLERANCE

    def lines(self) -> list[str]:
        differences = [
            f"check: max |Δlogits| {value:.1e} at {loops} loops" for loops, value in self.max_abs_difference.items()
        ]
        verdict = "agree" if self.greedy_agree else "DIFFER"
        return [*differences, f"check: {self.greedy_tokens} greedy tokens {verdict}"]


def require_original(source_format: str, target_format: str) -> None:
    """Raises ConfigError if the PyTorch original cannot be run."""
    formats = source_format, target_format
    if "openmythos" not in formats or native.INT8_FAMILY.name in formats:
        raise ConfigError(
            f"--check: got {source_format} to {target_format}, allowed: openmythos on one side, and no int8 weights on "
            "the other (no package has the originals of huginn and parcae; tests/golden has data made with them)"
        )
    missing = [name for name in ("torch", "transformers", "open_mythos") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--check: needs {', '.join(missing)}, not installed ({INSTALL})")


def check_conversion(source: Source, target: Source, *, length: int = 24, greedy: int = 8) -> Check:
    """Runs the original with the weights of whichever side is openmythos, and our model with those of the other."""
    theirs, ours = (target, source) if target.family.name == "openmythos" else (source, target)
    config, variables = load_variables(ours)
    config = replace(config, dtype="float32")
    their_logits = load_original(theirs)
    apply = jax.jit(_apply, static_argnums=(0, 3))

    def our_logits(tokens: np.ndarray, loops: int) -> np.ndarray:
        return np.asarray(apply(config, variables, tokens, loops))

    length = min(length, config.max_seq_len - greedy)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length)).astype(np.int32)
    differences = {
        loops: float(np.abs(our_logits(tokens, loops) - their_logits(tokens, loops)).max())
        for loops in sorted({1, config.loops, config.loops + 2})
    }
    our_tokens = _continue(our_logits, tokens, config.loops, greedy)
    their_tokens = _continue(their_logits, tokens, config.loops, greedy)
    return Check(differences, greedy, bool(np.array_equal(our_tokens, their_tokens)))


def load_original(source: Source) -> Logits:
    """The PyTorch model with the source's tensors, as a function."""
    import torch
    from open_mythos.main import MythosConfig, OpenMythos

    fields = source.family.from_model(source.config)
    model = OpenMythos(MythosConfig(**fields))
    state = {name: torch.from_numpy(np.array(source.read(name), np.float32)) for name in source.table.their_shapes}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = {*missing} - {*source.family.buffers, *source.family.ties(source.config)}
    if missing or unexpected:
        raise ConfigError(
            f"{source.path}: the original does not accept it: missing {sorted(missing)}, unexpected {unexpected}"
        )
    model.eval()

    def logits(tokens: np.ndarray, loops: int) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(tokens).long(), n_loops=loops).float().numpy()

    return logits


def _continue(logits: Logits, tokens: np.ndarray, loops: int, count: int) -> np.ndarray:
    """The tokens followed by `count` greedily chosen ones, computed without a cache."""
    length = tokens.shape[1]
    # One shape for every step. Padding at the end does not change what precedes it, since the models are causal.
    rows = np.pad(tokens, ((0, 0), (0, count)))
    for i in range(length, length + count):
        rows[:, i] = logits(rows, loops)[:, i - 1].argmax(-1)
    return rows


def _apply(config: ModelConfig, variables: Any, tokens: jax.Array, loops: int) -> jax.Array:
    output: Any = Mythos(config).apply(variables, jnp.asarray(tokens), loops=loops)
    return output.logits
