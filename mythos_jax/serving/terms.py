"""From a request to the numbers that the device knows it by."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax

from mythos_jax.config import ModelConfig
from mythos_jax.serving.options import Layout
from mythos_jax.serving.places import Terms
from mythos_jax.serving.policy import NEVER, policy_numbers
from mythos_jax.serving.programs import no_terms
from mythos_jax.serving.request import Request


def make_terms(config: ModelConfig, layout: Layout, request: Request, ring: int, pages: Sequence[int]) -> Terms:
    """The terms of a request, [1, ...], in NumPy. ring: its first place. pages: of its keys and values."""
    terms: Any = no_terms(layout, 1)
    sampling = terms.sampling
    numbers = [
        *zip(
            jax.tree.leaves(terms.policy),
            policy_numbers(config, layout.loops(config, request.loops), request.halting),
            strict=True,
        ),
        (sampling.temperature_B, request.temperature),
        (sampling.top_k_B, request.top_k),
        (sampling.top_p_B, request.top_p),
        (sampling.seed_B, request.seed),
        (terms.last_P, request.capacity - 1),
        (terms.draft_loops_P, request.draft_loops or 0),
        (terms.ring_P, ring),
        (terms.logprobs_P, request.logprobs is not None),
    ]
    for array, number in numbers:
        array[:] = number
    terms.stops_PS[:, : len(request.stop_tokens)] = request.stop_tokens
    terms.pages_PN[:, : len(pages)] = pages
    return terms


def shared_key(config: ModelConfig, layout: Layout, request: Request) -> Hashable:
    """What keys and values of a prompt depend on, besides its tokens: two requests with equal keys can share them."""
    limit, criterion, threshold, min_loops = policy_numbers(
        config, layout.loops(config, request.loops), request.halting
    )
    if request.halting is not None and request.halting.reads_logits:  # applies to new tokens only
        criterion, threshold, min_loops = NEVER, config.act_threshold, 1
    noise = request.seed if config.initial_state == "noise" else None
    return limit, criterion, repr(threshold), min_loops, noise
