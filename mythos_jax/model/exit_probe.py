"""Halting by logits: run the coda and the head after a loop and compare with the loop before."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mythos_jax.model.cache import LayerCache
from mythos_jax.model.halting import Halting
from mythos_jax.model.state import ProbeState
from mythos_jax.ops.chunked import map_chunks


def kl_divergence(old_BTV: jax.Array, new_BTV: jax.Array, _: jax.Array) -> jax.Array:
    """KL(old || new) of the distributions with these logits, in nats; float32 [B, T]."""
    old, new = jax.nn.log_softmax(old_BTV), jax.nn.log_softmax(new_BTV)
    return jnp.maximum(jnp.sum(jnp.exp(old) * (old - new), axis=-1), 0)  # rounding may leave it below 0


def entropy_change(old_BTV: jax.Array, new_BTV: jax.Array, _: jax.Array) -> jax.Array:
    """|H(new) - H(old)|, in nats; float32 [B, T]."""

    def entropy(logits: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    return jnp.abs(entropy(new_BTV) - entropy(old_BTV))


def times_equal(old_BTV: jax.Array, new_BTV: jax.Array, before_BT: jax.Array) -> jax.Array:
    """How many times in a row the most likely token has stayed the same, given that count for the loop before."""
    # A float, like the other measures, so that one carry serves all criteria.
    return jnp.where(old_BTV.argmax(-1) == new_BTV.argmax(-1), before_BT + 1, 0.0)


class LogitCriterion(NamedTuple):
    """How a criterion compares logits. `measure` maps the logits of the last loop, those of this loop, and its own
    result for the loop before to float32 [B, T]; a token halts when `met(measure, threshold)`."""

    measure: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    met: Callable[[jax.Array, jax.Array], jax.Array]


LOGIT_CRITERIA = {
    "kl": LogitCriterion(kl_divergence, operator.lt),
    "entropy": LogitCriterion(entropy_change, operator.lt),
    "argmax": LogitCriterion(times_equal, operator.ge),
}

Coda = Callable[[jax.Array, tuple[LayerCache, ...]], tuple[jax.Array, tuple[LayerCache, ...]]]


class LogitProbe(NamedTuple):
    """The coda and the head as functions of arrays, for looking at logits between two loops.

    coda: the state and the coda's caches to the features before the head and the caches after. Each loop writes the
    same places of the caches again. head: features to logits.
    """

    coda: Coda
    head: Callable[[jax.Array], Any]

    def start(self, state_BTD: jax.Array) -> ProbeState:
        """Nothing has been measured yet."""
        return ProbeState(jnp.zeros_like(state_BTD), jnp.zeros(state_BTD.shape[:2]))

    def look(
        self,
        halting: Halting,
        probe: ProbeState,
        caches: tuple[LayerCache, ...],
        state_BTD: jax.Array,
        loop_B1: jax.Array,
    ) -> tuple[ProbeState, tuple[LayerCache, ...], jax.Array]:
        """Reads out the state after loop t = `loop_B1` (from 0, int32 [B, 1] or []).

        Returns the new probe, the coda's caches, and bool [B, T], whose logits meet the criterion. The logits of both
        loops are one product, so that decoding a single token reads the head's weights once.
        """
        criterion = LOGIT_CRITERIA[halting.criterion]
        # Frozen tokens are read out again as well: they are a few rows of the same products.
        features_BTD, caches = self.coda(state_BTD, caches)

        def measure(old_BTD: jax.Array, new_BTD: jax.Array, before_BT: jax.Array) -> jax.Array:
            logits = self.head(jnp.concatenate([old_BTD, new_BTD], axis=1))
            old_BTV, new_BTV = jnp.split(logits, 2, axis=1)
            return criterion.measure(old_BTV, new_BTV, before_BT)

        vocab_size = jax.eval_shape(self.head, features_BTD).shape[-1]
        # In chunks of positions, so that [B, T, V] never exists for a large vocabulary.
        measure_BT = map_chunks(measure, (probe.features_BTD, features_BTD, probe.measure_BT), vocab_size)
        # The first loop has nothing to be compared with.
        comparable = loop_B1 > 0
        met_BT = criterion.met(measure_BT, halting.resolved_threshold) & comparable
        return ProbeState(features_BTD, jnp.where(comparable, measure_BT, 0)), caches, met_BT
