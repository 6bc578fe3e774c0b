"""From a request to the numbers that the device knows it by."""

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.serving.live import Live
from mythos_jax.serving.options import Layout
from mythos_jax.serving.places import Terms
from mythos_jax.serving.policy import NEVER, policy_numbers
from mythos_jax.serving.programs import no_terms
from mythos_jax.serving.request import Request


def make_terms(config: ModelConfig, layout: Layout, live: Live) -> Terms:
    """The terms of the places of `live.ring`, in its order; the rest of [P] is not looked at."""
    request, places = live.request, live.ring
    terms, n = jax.tree.map(np.copy, no_terms(layout, layout.places)), len(places)
    rows: list[tuple[Any, Any]] = [
        *zip(jax.tree.leaves(terms.policy), policy_numbers(config, request.loops, request.halting), strict=True),
        (terms.sampling.temperature_B, request.temperature),
        (terms.sampling.top_k_B, request.top_k),
        (terms.sampling.top_p_B, request.top_p),
        (terms.sampling.seed_B, request.seed),
        (terms.last_P, live.capacity() - 1),
        (terms.draft_loops_P, request.draft_loops or 0),
        (terms.ring_P, places[0]),
        (terms.next_P, [*places[1:], places[0]]),
        (terms.logprobs_P, request.logprobs is not None),
    ]
    for array, value in rows:
        array[:n] = value
    terms.stops_PS[:n, : len(request.stop_tokens)] = request.stop_tokens
    terms.pages_PN[:n, : len(live.held.pages)] = live.held.pages
    return terms


def shared_key(config: ModelConfig, request: Request) -> Hashable:
    """What keys and values of a prompt depend on, besides its tokens: two requests with equal keys can share them."""
    limit, criterion, threshold, min_loops = policy_numbers(config, request.loops, request.halting)
    if request.halting is not None and request.halting.reads_logits:  # applies to new tokens only
        criterion, threshold, min_loops = NEVER, config.act_threshold, 1
    noise = request.seed if config.initial_state == "noise" else None
    return limit, criterion, repr(threshold), min_loops, noise
