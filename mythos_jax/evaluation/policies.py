"""What an evaluation runs: fixed depths, and halting policies at several thresholds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mythos_jax.config import ModelConfig
from mythos_jax.model.halting import Halting, check_halting

# Thresholds of a policy that names none: from "nearly every loop runs" to "nearly none does".
SWEEPS: dict[str, tuple[float, ...]] = {
    "act": (0.3, 0.5, 0.7, 0.9, 0.99, 0.999),
    "latent": (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7),
    "cosine": (1e-4, 3e-4, 1e-3, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2),
    "kl": (1e-5, 1e-4, 5e-4, 0.003, 0.01, 0.03, 0.1, 0.3),
    "entropy": (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3),
    "argmax": (1, 2, 3, 5, 8),
    "predicted": (1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12),  # mean loops
}


@dataclass(frozen=True)
class Setting:
    """One way to run a model: `loops` for every token or, with a policy, at most so many."""

    loops: int
    halting: Halting | None = None

    @property
    def criterion(self) -> str | None:
        return self.halting and self.halting.criterion

    @property
    def threshold(self) -> float | None:
        return self.halting and self.halting.threshold

    @property
    def approximate(self) -> bool:
        """Whether decoding token by token may give something else than the full forward pass that is measured: the
        coda then sees its neighbours' current states (docs/model.md)."""
        return self.halting is not None and self.halting.reads_logits


def fixed(depths: Iterable[int]) -> list[Setting]:
    """Every token the same loops, one setting a depth."""
    return [Setting(depth) for depth in depths]


def settings(config: ModelConfig, depths: Sequence[int], policies: Sequence[Halting] = ()) -> list[Setting]:
    """Each depth, then each policy with at most the largest of them; a policy without a threshold runs its sweep.

    All settings of one criterion are one structure to jit, so that they share a program. Raises ConfigError for a
    policy that the model cannot follow.
    """
    chosen = fixed(sorted(set(depths)))
    for policy in policies:
        check_halting(config, policy, cached=False)
        sweep = SWEEPS[policy.criterion] if policy.threshold is None else (policy.threshold,)
        chosen += [Setting(max(depths), policy.replace(threshold=float(threshold))) for threshold in sweep]
    return list(dict.fromkeys(chosen))


def default_depths(trained: int) -> list[int]:
    """Powers of two up to twice the trained depth, and the trained depth itself."""
    powers = [2**i for i in range((2 * trained).bit_length())]
    return sorted({*(p for p in powers if p <= 2 * trained), trained})
