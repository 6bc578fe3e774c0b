"""Deciding per token when its loops end: learned (ACT), or zero-shot, by how far state or logits still move."""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.cache import Memory
from mythos_jax.model.layers import recomputed
from mythos_jax.ops.chunks import in_chunks

# Huginn's defaults (arXiv 2502.05171, and its code for the others); ACT's threshold is part of the model, and a
# predictor has a budget of its own.
DEFAULT_THRESHOLDS = {
    "act": None,
    "latent": 0.03,
    "cosine": 1e-3,
    "kl": 5e-4,
    "entropy": 1e-3,
    "argmax": 5,
    "predicted": None,
}
CRITERIA = tuple(DEFAULT_THRESHOLDS)
STATE_CRITERIA = ("act", "latent", "cosine", "predicted")  # the others look at the logits


@struct.dataclass
class Halting:
    """A halting policy, a property of a call. The criterion is static; the numbers may be traced, so that a sweep
    over thresholds compiles once.

    criterion:
      act      the cumulative halting probability reaches the threshold (the model's, unless given here);
               only for models with ACT read-out
      latent   |h_t - h_(t-1)| / |h_t| falls below the threshold; like all that follow only for models that read out
               the last state
      cosine   1 - cos(h_t, h_(t-1)) falls below the threshold
      kl       KL(p_(t-1) || p_t) of the next-token distributions falls below the threshold, in nats
      entropy  the entropy of the next-token distribution changes by less than the threshold, in nats
      argmax   the likeliest next token was that of the loop before, `threshold` times in a row
      predicted  the loops foreseen for the token by a trained predictor have run (`mythos predictor`); the threshold is
               a budget, the mean loops to keep to (default: the predictor's own)
    kl, entropy and argmax run coda and head after each loop, for decoding; they compare from loop 2 on.
    A token runs at least `min_loops` and at most `max_loops` loops (None: what the call allows).
    """

    criterion: str = struct.field(pytree_node=False)
    threshold: float | jax.Array | None = None
    min_loops: int | jax.Array = 1
    max_loops: int | jax.Array | None = None

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ConfigError(f"halting criterion: got {self.criterion!r}, allowed: {', '.join(CRITERIA)}")
        for name, value, least in [
            ("threshold", self.threshold, self.criterion == "predicted"),
            ("max_loops", self.max_loops, 1),
        ]:
            # Only of numbers: inside jax the fields may be anything.
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
                raise ConfigError(f"halting {name}: got {value}, allowed: a number >= {int(least)}")

    @property
    def resolved_threshold(self) -> float | jax.Array | None:
        return DEFAULT_THRESHOLDS[self.criterion] if self.threshold is None else self.threshold

    @property
    def reads_logits(self) -> bool:
        return self.criterion not in STATE_CRITERIA

    def most(self, loops: int | jax.Array) -> int | jax.Array:
        """The loops that a token of a call with `loops` may run."""
        return loops if self.max_loops is None else jnp.minimum(loops, self.max_loops)


def check_halting(config: ModelConfig, halting: Halting | None, cached: bool) -> None:
    """Raises ConfigError for a policy that this model cannot follow."""
    if halting is None:
        return
    if (halting.criterion == "act") != (config.readout == "act"):
        allowed = "act" if config.readout == "act" else ", ".join(c for c in CRITERIA if c != "act")
        raise ConfigError(
            f"halting criterion: got {halting.criterion!r}, allowed with readout {config.readout}: {allowed}"
        )
    if config.freeze_halted:
        return
    if cached:
        raise ConfigError(
            "halting: got a policy with a cache on a model with freeze_halted false, allowed: halting None "
            "(tokens that go on evolving need every loop's keys and values)"
        )
    if halting.reads_logits:
        raise ConfigError(
            f"halting criterion: got {halting.criterion!r} on a model with freeze_halted false, allowed: "
            f"{', '.join(STATE_CRITERIA)} (the logits it looks at would not be those that the token ends with)"
        )


@recomputed
def relative_change(new_BTD: jax.Array, old_BTD: jax.Array) -> jax.Array:
    """|new - old| / |new| per token, float32 [B, T]."""
    new, old = new_BTD.astype(jnp.float32), old_BTD.astype(jnp.float32)
    return jnp.linalg.norm(new - old, axis=-1) / jnp.maximum(jnp.linalg.norm(new, axis=-1), 1e-30)


def cosine_distance(new_BTD: jax.Array, old_BTD: jax.Array) -> jax.Array:
    """1 - cos(new, old) per token, float32 [B, T]; as half the squared distance of the unit vectors, which keeps its
    digits near 0."""

    def unit(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)

    return jnp.sum(jnp.square(unit(new_BTD) - unit(old_BTD)), axis=-1) / 2


# Of criteria that look at the state: what falls below the threshold.
_MOVES = {"latent": relative_change, "cosine": cosine_distance}


def state_rests(halting: Halting, new_BTD: jax.Array, old_BTD: jax.Array) -> jax.Array:
    """Whether the criterion is met by each token's step from the old state to the new one; bool [B, T]."""
    if halting.criterion not in _MOVES:
        return jnp.zeros(new_BTD.shape[:2], bool)
    return _MOVES[halting.criterion](new_BTD, old_BTD) < halting.resolved_threshold


def kl_divergence(old_BTV: jax.Array, new_BTV: jax.Array, _: jax.Array) -> jax.Array:
    """KL(old || new) of the distributions with these logits, in nats."""
    old, new = jax.nn.log_softmax(old_BTV), jax.nn.log_softmax(new_BTV)
    return jnp.maximum(jnp.sum(jnp.exp(old) * (old - new), axis=-1), 0)  # rounding may leave it below 0


def entropy_change(old_BTV: jax.Array, new_BTV: jax.Array, _: jax.Array) -> jax.Array:
    """|H(new) - H(old)|, in nats."""

    def entropy(logits):
        log_p = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    return jnp.abs(entropy(new_BTV) - entropy(old_BTV))


def times_equal(old_BTV: jax.Array, new_BTV: jax.Array, before_BT: jax.Array) -> jax.Array:
    """How often in a row the likeliest token has been the same, given how often before."""
    return jnp.where(old_BTV.argmax(-1) == new_BTV.argmax(-1), before_BT + 1, 0.0)


class LogitsCriterion(NamedTuple):
    """How a criterion looks at logits: `measure` maps those of the last loop and of this one, and what it gave for
    the loop before, to float32 [B, T]; a token halts when `met(measure, threshold)`."""

    measure: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    met: Callable[[jax.Array, jax.Array], jax.Array]


_LOGITS = {
    "kl": LogitsCriterion(kl_divergence, operator.lt),
    "entropy": LogitsCriterion(entropy_change, operator.lt),
    "argmax": LogitsCriterion(times_equal, operator.ge),
}


@struct.dataclass
class Reading:
    """What is read out after a loop, carried to the next where the criterion looks at logits.

    features: [B, T, D] before the head. memory: of the coda's layers; each loop writes the same places again.
    measure: float32 [B, T], see `LogitsCriterion`.
    """

    features_BTD: jax.Array
    memory: tuple[Memory, ...]
    measure_BT: jax.Array


class Reader(NamedTuple):
    """The coda and the head as functions, for those who look at logits in the middle of the loops.

    read: the state and the coda's memory to the features before the head and the memory after.
    head: features to logits. memory: of the coda's layers, before the call.
    """

    read: Callable[[jax.Array, tuple[Memory, ...]], tuple[jax.Array, tuple[Memory, ...]]]
    head: Callable[[jax.Array], jax.Array]
    memory: tuple[Memory, ...]

    def start(self, state_BTD: jax.Array) -> Reading:
        """Nothing has been read yet."""
        return Reading(jnp.zeros_like(state_BTD), self.memory, jnp.zeros(state_BTD.shape[:2]))

    def look(self, halting: Halting, reading: Reading, state_BTD: jax.Array, t: jax.Array) -> tuple[Reading, jax.Array]:
        """Reads out the state after loop t (from 0); also returns, bool [B, T], whose logits meet the criterion.

        The logits of both loops are one product, so that a token alone reads the head's weights once.
        """
        criterion = _LOGITS[halting.criterion]
        features_BTD, memory = self.read(state_BTD, reading.memory)

        def measure(old_BTD, new_BTD, before_BT):
            logits = self.head(jnp.concatenate([old_BTD, new_BTD], axis=1))
            return criterion.measure(*jnp.split(logits, 2, axis=1), before_BT)

        vocabulary = jax.eval_shape(self.head, features_BTD).shape[-1]
        measure_BT = in_chunks(measure, (reading.features_BTD, features_BTD, reading.measure_BT), vocabulary)
        met_BT = criterion.met(measure_BT, halting.resolved_threshold) & (t > 0)
        # The first loop has nothing to be compared with.
        return Reading(features_BTD, memory, jnp.where(t > 0, measure_BT, 0)), met_BT


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
