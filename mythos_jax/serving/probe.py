"""Halting by logits in the engine: coda and head after a loop, for the rows whose policy compares logits."""

from typing import cast

import jax
import jax.numpy as jnp

from mythos_jax.model.apply import apply
from mythos_jax.model.cache import Cache
from mythos_jax.model.exit_probe import LOGIT_CRITERIA
from mythos_jax.model.mythos import Mythos
from mythos_jax.serving.places import Setup, Terms, Work, run_if, seen_pages


def halt_by_logits(setup: Setup, terms: Terms, work: Work, cache: Cache, looks_K: jax.Array) -> tuple[Work, Cache]:
    """The work after a look at the logits of the rows of `looks_K`, as `model.exit_probe.LogitProbe` takes it: tokens
    whose logits meet their criterion have halted.

    `work.loop_P` counts the loops that have been run. If one row looks, coda and head run for all; if none
    does, for none.
    """

    def look(state: tuple[Work, Cache]) -> tuple[Work, Cache]:
        def forward(model: Mythos) -> tuple[Work, Cache]:
            return _look(model, terms, *state, looks_K)

        return apply(forward, setup.model, setup.variables)

    return run_if(looks_K.any(), look, (work, cache))


def _look(model: Mythos, terms: Terms, work: Work, cache: Cache, looks_K: jax.Array) -> tuple[Work, Cache]:
    policy, seen = terms.policy, cache.at(seen_pages(cache, terms.pages_PN, looks_K), work.position_P)
    out = model.finish(work.tokens, seen, logits=False)
    features_KD = out.features[:, 0]
    # The logits of both loops are one product, which reads the head's weights once.
    logits_K2V = model.head(jnp.stack([work.features_PD, features_KD], axis=1))
    old_K1V, new_K1V = logits_K2V[:, :1], logits_K2V[:, 1:]
    measure_K1, met_K1 = jnp.zeros(out.features.shape[:2]), jnp.zeros(out.features.shape[:2], bool)
    for name, criterion in LOGIT_CRITERIA.items():
        is_K1 = policy.is_(name)[:, None]
        measured_K1 = criterion.measure(old_K1V, new_K1V, work.measure_P[:, None])
        measure_K1 = jnp.where(is_K1, measured_K1, measure_K1)
        met_K1 |= is_K1 & criterion.met(measured_K1, policy.threshold_B[:, None])
    comparable_K = work.loop_P > 1  # the first loop has nothing to be compared with
    met_K = met_K1[:, 0] & comparable_K & looks_K & (work.loop_P >= policy.min_loops_B)
    halts_K1 = met_K[:, None] & ~work.tokens.halted_BT
    cache = cache.replace(coda=cast(Cache, out.cache).coda)
    tokens, halted = model.halt(work.tokens, cache, halts_K1, work.loop_P)
    work = work.replace(
        tokens=tokens,
        features_PD=jnp.where(looks_K[:, None], features_KD, work.features_PD),
        measure_P=jnp.where(looks_K & comparable_K, measure_K1[:, 0], 0),
    )
    return work, cast(Cache, halted)
