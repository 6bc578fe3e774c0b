"""Running the PyTorch original beside our model, on the same tokens (`mythos convert --check`)."""

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.pretrained import variables_of
from mythos_jax.porting.reading import Source

TOLERANCE = 1e-4
INSTALL = "pip install torch transformers, then pip install --no-deps open-mythos==0.5.0"


@dataclass(frozen=True)
class Check:
    """max_abs_difference: of float32 logits, the largest over all tokens, by loop count. greedy_agree: whether both
    continue a prompt with the same `greedy_tokens` tokens."""

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


def require_original(source: str, target: str) -> None:
    """Raises ConfigError where the PyTorch original cannot be run."""
    if "openmythos" not in (source, target):
        raise ConfigError(
            f"--check: got {source} to {target}, allowed: openmythos on one side (huginn and parcae have no original "
            "in a package; golden data made with theirs is in tests/golden)"
        )
    lacks = [name for name in ("torch", "transformers", "open_mythos") if importlib.util.find_spec(name) is None]
    if lacks:
        raise ConfigError(f"--check: needs {', '.join(lacks)}, not installed ({INSTALL})")


def check_conversion(source: Source, target: Source, *, length: int = 24, greedy: int = 8) -> Check:
    """Runs the original on whichever side is openmythos and our model on the other."""
    theirs, ours = (target, source) if target.family.name == "openmythos" else (source, target)
    config, variables = variables_of(ours)
    config = replace(config, dtype="float32")
    run_original = original(theirs)
    length = min(length, config.max_seq_len - greedy)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length)).astype(np.int32)
    depths = sorted({1, config.loops, config.loops + 2})
    run = jax.jit(_run, static_argnums=(0, 3))

    def run_ours(row: np.ndarray, loops: int) -> np.ndarray:
        return np.asarray(run(config, variables, row, loops))

    differences = {n: float(np.abs(run_ours(tokens, n) - run_original(tokens, n)).max()) for n in depths}

    def continued(logits_of: Any) -> np.ndarray:
        row = np.pad(tokens, ((0, 0), (0, greedy)))  # causal: what stands behind a token does not change it
        for i in range(length, length + greedy):
            row[:, i] = logits_of(row)[:, i - 1].argmax(-1)
        return row

    one = continued(lambda row: run_ours(row, config.loops))
    other = continued(lambda row: run_original(row, config.loops))
    return Check(differences, greedy, bool(np.array_equal(one, other)))


def original(source: Source) -> Any:
    """The PyTorch model with the source's tensors: a function from tokens [B, T] and loops to logits [B, T, V]."""
    import torch
    from open_mythos.main import MythosConfig, OpenMythos

    fields = source.family.from_model(source.config)
    model = OpenMythos(MythosConfig(**fields))
    state = {name: torch.from_numpy(np.array(source.read(name), np.float32)) for name in source.table.their_shapes}
    missing, unexpected = model.load_state_dict(state, strict=False)
    left = {*missing} - {*source.family.buffers, *source.family.tied}
    if left or unexpected:
        raise ConfigError(f"{source.path}: the original does not take it: {sorted(left)} {unexpected}")
    model.eval()

    def run(tokens: np.ndarray, loops: int) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(tokens).long(), n_loops=loops).float().numpy()

    return run


def _run(config: ModelConfig, variables: Any, tokens: jax.Array, loops: int) -> jax.Array:
    return Mythos(config).apply(variables, jnp.asarray(tokens), loops=loops).logits
