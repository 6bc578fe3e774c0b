"""What a request may ask of an engine."""

from typing import Any

import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.inference.request import check, check_depth, check_prompts, check_sampling, check_tokens
from mythos_jax.model.cache import loop_cache_for
from mythos_jax.model.halting import STATE_CRITERIA
from mythos_jax.serving.options import EngineOptions, Layout
from mythos_jax.serving.request import MAX_ALTERNATIVES, MAX_STOP_TOKENS, Request


def check_request(
    config: ModelConfig, variables: Any, layout: Layout, options: EngineOptions, request: Request
) -> None:
    """Raises ConfigError, with one line that names what the model or the engine cannot do."""
    try:
        _check_integers(request)
        check_prompts(config, [request.tokens], None, request.max_new_tokens)
        stops = check_tokens("stop_tokens", np.asarray(request.stop_tokens, np.int64).reshape(-1), config)
        check_sampling(config, request.temperature, request.top_k, request.top_p, request.seed, 1)
        check_depth(config, variables, layout.loops(config, request.loops), request.halting)
        _check_sizes(config, layout, request, len(stops))
        if request.draft_loops is not None:
            _check_drafts(config, layout, options, request, request.draft_loops)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_integers(request: Request) -> None:
    policy = request.halting
    numbers: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "loops": request.loops,
        "min_loops": policy and policy.min_loops,
        "max_loops": policy and policy.max_loops,
        "logprobs": request.logprobs,
        "draft_loops": request.draft_loops,
        "draft_tokens": request.draft_tokens,
    }
    for name, number in numbers.items():
        whole = isinstance(number, int | np.integer) and -(2**31) <= number < 2**31
        check(number is None or bool(whole), name, number, "an integer of 32 bits")


def _check_sizes(config: ModelConfig, layout: Layout, request: Request, stops: int) -> None:
    tokens, new, limit = len(request.tokens), request.max_new_tokens, layout.max_length
    check(new >= 1, "max_new_tokens", new, "an integer >= 1")
    check(tokens + new <= limit, "prompt", f"{tokens} tokens and {new} new ones", f"at most {limit} together")
    loops, most = layout.loops(config, request.loops), layout.max_loops
    check(loops <= most, "loops", loops, f"at most {most}, what the engine has room for")
    check(stops <= MAX_STOP_TOKENS, "stop_tokens", f"{stops} of them", f"at most {MAX_STOP_TOKENS}")
    wanted = request.logprobs
    check(wanted is None or 0 <= wanted <= MAX_ALTERNATIVES, "logprobs", wanted, f"0 to {MAX_ALTERNATIVES}, or None")


def _check_drafts(
    config: ModelConfig, layout: Layout, options: EngineOptions, request: Request, draft_loops: int
) -> None:
    """A draft goes on where the token before it has been: at its depth, and with its keys and values of that depth."""
    loops, most = layout.loops(config, request.loops), layout.places - 1
    check(most >= 1, "draft_loops", f"{draft_loops} in an engine of one place", "at least 2 places, one for each draft")
    check(1 <= draft_loops <= loops, "draft_loops", draft_loops, f"1 to loops, {loops}")
    check(1 <= request.draft_tokens <= most, "draft_tokens", request.draft_tokens, f"1 to {most}, one below the places")
    rule = options.loop_cache
    exact = loop_cache_for(config, rule, layout.max_loops) == "all"
    check(exact, "draft_loops", f"{draft_loops} with loop_cache {rule}", "loop_cache all, a slot for each loop")
    if request.halting is not None:
        known = f"with drafts {', '.join(STATE_CRITERIA)}, which look at the state only"
        check(not request.halting.reads_logits, "halting criterion", repr(request.halting.criterion), known)
