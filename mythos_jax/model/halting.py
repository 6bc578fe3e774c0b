"""When a token's loops end: learned (ACT), predicted, or zero-shot, by how far its state or logits still change."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.layers import recomputed

# Huginn's defaults (arXiv 2502.05171, and its code for the others). ACT's threshold is part of the model, and a
# predictor comes with a budget of its own.
DEFAULT_THRESHOLDS = {
    "act": None,
    "latent": 0.03,
    "cosine": 1e-3,
    "kl": 5e-4,
    "entropy": 1e-3,
    "argmax": 5,
    "predicted": None,
    "gate": 0.9,
}
CRITERIA = tuple(DEFAULT_THRESHOLDS)
STATE_CRITERIA = ("act", "latent", "cosine", "predicted", "gate")  # the others look at the logits
MANUAL = "manual"  # not among the criteria that a user can ask for: the caller decides


class Halting(struct.PyTreeNode):
    """A halting policy, a property of a call. The criterion is static; the numbers may be traced, so that a sweep
    over thresholds compiles once.

    criterion:
      act      the cumulative halting probability reaches the threshold (the model's, unless given here);
               only for models with ACT read-out
      latent   |h_t - h_(t-1)| / |h_t| falls below the threshold; like all criteria below, only for models that read
               out the last state
      cosine   1 - cos(h_t, h_(t-1)) falls below the threshold
      kl       KL(p_(t-1) || p_t) of the next-token distributions falls below the threshold, in nats
      entropy  the entropy of the next-token distribution changes by less than the threshold, in nats
      argmax   the most likely next token has stayed the same `threshold` times in a row
      predicted  the token has run the number of loops that a trained predictor asks for (`mythos train-predictor`); the
               threshold is a budget, the mean number of loops per token to stay within (default: the predictor's own)
      gate     the probability of the model's exit gate that the token has exited by now reaches the threshold; only for
               models with a gate (Ouro, arXiv 2510.25741); at 1 the token runs all its loops
      manual   never by itself: the caller steps through depth and ends a token's loops with `Mythos.halt`, by whatever
               rule it likes (`state_criterion_met` is that of the criteria above); it has no threshold, and min_loops
               is up to the caller
    kl, entropy and argmax run the coda and the head after each loop and are meant for decoding; they compare from the
    second loop on. A token runs at least `min_loops` and at most `max_loops` loops (None: what the call allows).
    """

    criterion: str = struct.field(pytree_node=False)
    threshold: float | jax.Array | None = None
    min_loops: int | jax.Array = 1
    max_loops: int | jax.Array | None = None

    def __post_init__(self):
        if self.criterion not in (*CRITERIA, MANUAL):
            raise ConfigError(f"halting criterion: got {self.criterion!r}, allowed: {', '.join(CRITERIA)}")
        if self.criterion == MANUAL and isinstance(self.threshold, int | float):
            raise ConfigError(f"halting threshold: got {self.threshold}, allowed with manual: none")
        for name, value, lowest in [
            ("threshold", self.threshold, self.criterion == "predicted"),
            ("max_loops", self.max_loops, 1),
        ]:
            # Numbers only: inside jax a field may hold a tracer, a shape, or nothing at all.
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= lowest):
                raise ConfigError(f"halting {name}: got {value}, allowed: a number >= {int(lowest)}")
        if self.criterion == "gate" and isinstance(self.threshold, int | float) and self.threshold > 1:
            raise ConfigError(f"halting threshold: got {self.threshold}, allowed with gate: a number from 0 to 1")

    @classmethod
    def parse(cls, text: str) -> "Halting":
        """The policy written as CRITERION or CRITERION:THRESHOLD, such as `latent:0.03`. Raises ConfigError."""
        criterion, _, threshold = text.partition(":")
        if criterion == MANUAL:  # nobody would end the loops
            raise ConfigError(f"halting criterion: got {criterion!r}, allowed: {', '.join(CRITERIA)}")
        try:
            return cls(criterion, float(threshold) if threshold else None)
        except ConfigError:
            raise
        except ValueError:
            raise ConfigError(
                f"halting policy: got {text!r}, allowed: CRITERION:THRESHOLD, as in latent:0.03"
            ) from None

    @property
    def text(self) -> str:
        """The policy as `parse` reads it; its least and most loops are not part of that."""
        return self.criterion if self.threshold is None else f"{self.criterion}:{self.threshold:g}"

    @property
    def resolved_threshold(self) -> Any:
        """The threshold as given, else the criterion's default; None for ACT and `predicted`, which have their own."""
        return DEFAULT_THRESHOLDS[self.criterion] if self.threshold is None else self.threshold

    @property
    def reads_logits(self) -> bool:
        return self.criterion not in (*STATE_CRITERIA, MANUAL)

    def limit(self, loops: int | jax.Array) -> int | jax.Array:
        """The maximum number of loops that a token may run in a call with `loops`."""
        return loops if self.max_loops is None else jnp.minimum(loops, self.max_loops)

    def for_prompt(self, loops: int | jax.Array) -> tuple[int | jax.Array, "Halting | None"]:
        """Loops and policy for a prompt that fills a cache: criteria that look at the logits apply to new tokens only,
        so a prompt runs all its loops."""
        return (self.limit(loops), None) if self.reads_logits else (loops, self)


def check_halting(config: ModelConfig, halting: Halting | None, cached: bool) -> None:
    """Raises ConfigError for a policy that this model cannot follow."""
    if halting is None:
        return
    # An ACT read-out is a weighted sum over loops: only ACT itself says when its weights are spent.
    if (halting.criterion == "act") != (config.readout == "act"):
        allowed = "act" if config.readout == "act" else ", ".join(c for c in CRITERIA if c != "act")
        raise ConfigError(
            f"halting criterion: got {halting.criterion!r}, allowed with readout {config.readout}: {allowed}"
        )
    if halting.criterion == "gate" and not config.exit_gate:
        raise ConfigError("halting criterion: got 'gate', allowed only for a model with exit_gate true")
    if config.freeze_halted:
        return
    # What follows needs the state that a token halted with, which such a model does not keep.
    if cached:
        raise ConfigError(
            "halting: got a policy with a cache on a model with freeze_halted false, allowed: halting None "
            "(tokens that keep evolving need the keys and values of every loop)"
        )
    if halting.reads_logits:
        raise ConfigError(
            f"halting criterion: got {halting.criterion!r} on a model with freeze_halted false, allowed: "
            f"{', '.join(STATE_CRITERIA)} (the logits it compares would not be those that the token ends with)"
        )
    if halting.criterion == MANUAL:
        raise ConfigError("halting criterion: got 'manual', allowed only for a model with freeze_halted true")


def check_expected(config: ModelConfig) -> None:
    """Raises ConfigError for a model that has no expected logits."""
    if not config.exit_gate:
        raise ConfigError("expected logits: got a model without an exit gate, allowed only with exit_gate true")


@recomputed
def relative_change(new_BTD: jax.Array, old_BTD: jax.Array) -> jax.Array:
    """|new - old| / |new| per token, float32 [B, T]."""
    new, old = new_BTD.astype(jnp.float32), old_BTD.astype(jnp.float32)
    # The floor only matters for a state that is exactly 0.
    return jnp.linalg.norm(new - old, axis=-1) / jnp.maximum(jnp.linalg.norm(new, axis=-1), 1e-30)


def cosine_distance(new_BTD: jax.Array, old_BTD: jax.Array) -> jax.Array:
    """1 - cos(new, old) per token, float32 [B, T]; computed as half the squared distance of the unit vectors, which
    stays accurate near 0."""

    def unit(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)

    return jnp.sum(jnp.square(unit(new_BTD) - unit(old_BTD)), axis=-1) / 2


# What criteria that look at the state compare with the threshold.
STATE_CHANGE = {"latent": relative_change, "cosine": cosine_distance}


def state_criterion_met(
    halting: Halting,
    loop_B1: jax.Array,
    new_BTD: jax.Array,
    old_BTD: jax.Array,
    survival_BT: jax.Array | None = None,
    predicted_BT: jax.Array | None = None,
) -> jax.Array:
    """Whether loop t = `loop_B1` (from 0), which made the new state of the old one, brings each token to its policy's
    end; bool [B, T]. The policy's numbers may be one per row, [B, 1].

    survival_BT: after this loop, where the criterion is the gate. predicted_BT: `predicted_loops`, where it is
    `predicted`. False for ACT and for criteria that look at the logits: those are decided elsewhere.
    """
    if halting.criterion == "predicted":
        assert predicted_BT is not None, "make_context predicts"
        met_BT = loop_B1 + 1 >= predicted_BT
    elif halting.criterion == "gate":
        assert survival_BT is not None, "check_halting asks for a gate"
        # At 1 every loop runs, also where the gate is so sure that its float32 probability is 1.
        q = halting.resolved_threshold
        met_BT = (survival_BT <= 1 - q) & (q < 1)
    elif halting.criterion in STATE_CHANGE:
        met_BT = STATE_CHANGE[halting.criterion](new_BTD, old_BTD) < halting.resolved_threshold
    else:
        return jnp.zeros(new_BTD.shape[:2], bool)
    return met_BT & (loop_B1 + 1 >= halting.min_loops)


def act_weight(
    p_BT: jax.Array,
    cumulative_BT: jax.Array,
    threshold: float | jax.Array,
    may_halt_B1: jax.Array,
    last_B1: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of adaptive computation time (Graves, arXiv 1603.08983) for tokens that are still running.

    Returns the weight of this loop's state, the new cumulative probability, and whether the token halts here. A token
    halts when its cumulative probability reaches the threshold and its row `may_halt`. It then takes the remainder,
    1 - cumulative, which no weight exceeds, and its cumulative probability is 1. `last_B1`, true on the last loop of a
    row, gives the remainder to tokens that never reached the threshold; None leaves their weights short of 1, as the
    original OpenMythos does.
    """
    # With min_loops the cumulative probability can exceed 1 before the token may halt.
    rest_BT = jnp.maximum(1 - cumulative_BT, 0)
    halts_BT = may_halt_B1 & (cumulative_BT + p_BT >= threshold)
    takes_rest_BT = halts_BT if last_B1 is None else halts_BT | last_B1
    weight_BT = jnp.where(takes_rest_BT, rest_BT, jnp.minimum(p_BT, rest_BT))
    return weight_BT, jnp.where(takes_rest_BT, 1.0, cumulative_BT + p_BT), halts_BT
