"""Deciding per token when its loops end: learned (ACT) or zero-shot (how much the state still moves)."""

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ConfigError, ModelConfig

CRITERIA = ("act", "latent")
STATE_CRITERIA = ("act", "latent")  # those that look at the state only

# Huginn's defaults (arXiv 2502.05171); ACT's threshold is part of the model.
DEFAULT_THRESHOLDS = {"act": None, "latent": 0.03}


@struct.dataclass
class Halting:
    """A halting policy, a property of a call. The criterion is static; the numbers may be traced, so that a sweep
    over thresholds compiles once.

    criterion:
      act     the cumulative halting probability reaches the threshold (the model's, unless given here);
              only for models with ACT read-out
      latent  |h_t - h_(t-1)| / |h_t| falls below the threshold; only for models that read out the last state
    A token runs at least `min_loops` and at most `max_loops` loops (None: what the call allows).
    """

    criterion: str = struct.field(pytree_node=False)
    threshold: float | jax.Array | None = None
    min_loops: int | jax.Array = 1
    max_loops: int | jax.Array | None = None

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ConfigError(f"halting criterion: got {self.criterion!r}, allowed: {', '.join(CRITERIA)}")

    @property
    def resolved_threshold(self) -> float | jax.Array | None:
        return DEFAULT_THRESHOLDS[self.criterion] if self.threshold is None else self.threshold


def check_halting(config: ModelConfig, halting: Halting | None, cached: bool) -> None:
    """Raises ConfigError for a policy that this model cannot follow."""
    if halting is None:
        return
    if (halting.criterion == "act") != (config.readout == "act"):
        allowed = "act" if config.readout == "act" else ", ".join(c for c in CRITERIA if c != "act")
        raise ConfigError(
            f"halting criterion: got {halting.criterion!r}, allowed with readout {config.readout}: {allowed}"
        )
    if cached and not config.freeze_halted:
        raise ConfigError(
            "halting: got a policy with a cache on a model with freeze_halted false, allowed: halting None "
            "(tokens that go on evolving need every loop's keys and values)"
        )


def relative_change(new_BTD: jax.Array, old_BTD: jax.Array) -> jax.Array:
    """|new - old| / |new| per token, float32 [B, T]."""
    new, old = new_BTD.astype(jnp.float32), old_BTD.astype(jnp.float32)
    return jnp.linalg.norm(new - old, axis=-1) / jnp.maximum(jnp.linalg.norm(new, axis=-1), 1e-30)


def act_weight(
    p_BT: jax.Array,
    cumulative_BT: jax.Array,
    threshold: float | jax.Array,
    may_halt_B1: jax.Array,
    last_B1: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One step of adaptive computation time (Graves, arXiv 1603.08983) for tokens that are still running.

    Returns the weight of this loop's state and whether the token halts here. A token halts when its cumulative
    probability reaches the threshold and the row `may_halt`, and then takes the remainder 1 - cumulative; no weight
    exceeds that. `last_B1`, true on the last loop of a row, gives the remainder to tokens that never got there; None
    leaves their weights short of 1, as the original does.
    """
    rest_BT = jnp.maximum(1 - cumulative_BT, 0)
    halts_BT = may_halt_B1 & (cumulative_BT + p_BT >= threshold)
    takes_rest_BT = halts_BT if last_B1 is None else halts_BT | last_B1
    return jnp.where(takes_rest_BT, rest_BT, jnp.minimum(p_BT, rest_BT)), halts_BT
