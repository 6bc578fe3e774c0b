"""The settings an evaluation runs: fixed depths, read out as the last or the expected logits, and halting policies at
one or more thresholds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mythos_jax.config import ModelConfig
from mythos_jax.model.halting import Halting, check_expected, check_halting
from mythos_jax.model.likelihood import Forward, expected_forward, forward

# Thresholds for a policy given without one, from "nearly every loop runs" to "nearly none does".
SWEEPS: dict[str, tuple[float, ...]] = {
    "act": (0.3, 0.5, 0.7, 0.9, 0.99, 0.999),
    "latent": (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7),
    "cosine": (1e-4, 3e-4, 1e-3, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2),
    "kl": (1e-5, 1e-4, 5e-4, 0.003, 0.01, 0.03, 0.1, 0.3),
    "entropy": (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3),
    "argmax": (1, 2, 3, 5, 8),
    "predicted": (1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12),  # mean loops
    "gate": (0.999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3),
}


@dataclass(frozen=True)
class Setting:
    """One way to run a model. loops: for every token, or the maximum if there is a halting policy. expected: reads out
    the exit gate's expected logits instead of the last loop's; without a policy."""

    loops: int
    halting: Halting | None = None
    expected: bool = False

    @property
    def is_fixed_depth(self) -> bool:
        """Whether this is a point of the line that everything else is compared with."""
        return self.halting is None and not self.expected

    @property
    def forward(self) -> Forward:
        """The way to run the model; `loops` and `halting` are its arguments."""
        return expected_forward if self.expected else forward

    @property
    def criterion(self) -> str | None:
        """Of the policy; "expected" for expected logits, and None for a fixed depth."""
        return "expected" if self.expected else None if self.halting is None else self.halting.criterion

    @property
    def threshold(self) -> float | None:
        return None if self.halting is None or self.halting.threshold is None else float(self.halting.threshold)

    @property
    def approximate(self) -> bool:
        """Whether decoding token by token may give a different result from the full forward pass that is measured.

        There the coda sees the neighbours' current states, not their final ones (docs/model.md).
        """
        return self.halting is not None and self.halting.reads_logits


def fixed(depths: Iterable[int]) -> list[Setting]:
    """One setting per depth, the same number of loops for every token."""
    return [Setting(depth) for depth in depths]


def make_settings(
    config: ModelConfig, depths: Sequence[int], policies: Sequence[Halting] = (), expected: bool = False
) -> list[Setting]:
    """Each depth, if `expected` again with the expected logits, then each policy with at most the largest depth; a
    policy without a threshold runs its sweep.

    All settings of one criterion have one structure, so they share a compiled program. Raises ConfigError for what the
    model cannot do.
    """
    settings = fixed(sorted(set(depths)))
    if expected:
        check_expected(config)
        settings += [replace(setting, expected=True) for setting in settings]
    for policy in policies:
        check_halting(config, policy, cached=False)
        sweep = SWEEPS[policy.criterion] if policy.threshold is None else (policy.threshold,)
        settings += [Setting(max(depths), replace(policy, threshold=float(threshold))) for threshold in sweep]
    return list(dict.fromkeys(settings))


def default_depths(trained_loops: int) -> list[int]:
    """Powers of two up to twice the trained depth, and the trained depth itself."""
    powers = [2**i for i in range((2 * trained_loops).bit_length())]
    return sorted({*(power for power in powers if power <= 2 * trained_loops), trained_loops})
