"""Self-speculative decoding: a draft is the first part of the model's own computation.

A round drafts n tokens one by one with `draft_loops` loops each. Their `TokenState`s, with keys and values at that
depth in the cache, are joined, and all of them run on to full depth together: a loop over n + 1 tokens costs little
more than one over a single token, and no loop is computed twice. The drafts that full depth confirms are kept, with
the correct token after them; the cache's length is set back over the rest. The result is that of plain greedy decoding.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.inference.generate import begin, prefill_all
from mythos_jax.inference.request import Lengths, Options, Tokens, check, prepare
from mythos_jax.inference.state import GenerateResult, Setup
from mythos_jax.model.apply import apply
from mythos_jax.model.cache import Cache, loop_cache_for
from mythos_jax.model.halting import STATE_CRITERIA
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import Output, TokenState, take_remainder

STREAM_ROUNDS = 4  # of one call of the device


class SpeculativeResult(GenerateResult):
    """A `GenerateResult`, and how the drafts did.

    drafted, accepted: int32 [B], tokens of each row that were drafted, and how many of them full depth confirmed.
    rounds: int32 [], how many times drafts were verified.
    """

    drafted: jax.Array
    accepted: jax.Array
    rounds: jax.Array

    @property
    def acceptance(self) -> float:
        """Fraction of drafted tokens that were confirmed; 0 if none was drafted."""
        return float(self.accepted.sum() / max(int(self.drafted.sum()), 1))


class Progress(struct.PyTreeNode):
    """A batch between two rounds. `token_B`, the last token of each row, is not in the cache yet; all before it are."""

    cache: Cache
    done_B: jax.Array
    token_B: jax.Array
    result: SpeculativeResult


def speculate(
    model: Mythos,
    variables: Any,
    tokens_BT: Tokens,
    lengths: Lengths = None,
    *,
    draft_loops: int,
    draft_tokens: int = 3,
    **options: Unpack[Options],
) -> SpeculativeResult:
    """The greedy tokens that `generate` gives with the same arguments, in less time where most drafts are right.

    draft_loops: loops of a draft, 1 to `loops`. draft_tokens: drafts per round. Other keywords as in `generate`, but
    halting must look at the state only: a token that has halted by `draft_loops` is final, one that halts later runs
    on. Raises ValueError with one line that names the argument, what it got and what is allowed.
    """
    setup, progress = _start(model, variables, tokens_BT, lengths, draft_loops, draft_tokens, options)
    max_new_tokens = progress.result.tokens.shape[1]
    if max_new_tokens > 0:  # a round adds at least one token
        progress = _decode(setup, progress, np.int32(max_new_tokens), draft_loops, draft_tokens)
    return progress.result


def stream_drafts(
    model: Mythos,
    variables: Any,
    tokens_BT: Tokens,
    lengths: Lengths = None,
    *,
    draft_loops: int,
    draft_tokens: int = 3,
    every: int = STREAM_ROUNDS,
    **options: Unpack[Options],
) -> Iterator[SpeculativeResult]:
    """Like `speculate`, but in pieces of up to `every` rounds, in the form that `stream` gives them; drafted, accepted
    and rounds count from the start."""
    setup, progress = _start(model, variables, tokens_BT, lengths, draft_loops, draft_tokens, options)
    return _pieces(setup, progress, draft_loops, draft_tokens, every)


def _pieces(
    setup: Setup, progress: Progress, draft_loops: int, draft_tokens: int, every: int
) -> Iterator[SpeculativeResult]:
    before_B = 0
    while True:
        result, done_B = jax.device_get((progress.result, progress.done_B))
        new_B = result.lengths - before_B
        step_N = np.arange(new_B.max(initial=0))
        at_BN = np.minimum((result.lengths - new_B)[:, None] + step_N, max(result.tokens.shape[1] - 1, 0))
        tokens, loops = (
            np.where(step_N < new_B[:, None], np.take_along_axis(x, at_BN, axis=1), 0)
            for x in (result.tokens, result.loops)
        )
        if len(step_N):
            yield result.replace(tokens=tokens, loops=loops, lengths=new_B)
        if done_B.all() or (result.lengths == result.tokens.shape[1]).all():
            return
        before_B = result.lengths
        progress = _decode(setup, progress, result.rounds + np.int32(every), draft_loops, draft_tokens)


def _start(
    model: Mythos,
    variables: Any,
    tokens_BT: Tokens,
    lengths: Lengths,
    draft_loops: int,
    draft_tokens: int,
    options: Options,
) -> tuple[Setup, Progress]:
    """Checks the arguments and reads the prompts."""
    job = prepare(model, variables, tokens_BT, lengths, **options)
    check_drafts(model.config, draft_loops, draft_tokens, options)
    setup = job.setup
    state = prefill_all(job) if job.max_new_tokens else job.state
    plain, (drafted, accepted) = state.result, (jnp.zeros(len(state.done_B), jnp.int32) for _ in range(2))
    result = SpeculativeResult(plain.tokens, plain.lengths, plain.loops, drafted, accepted, rounds=jnp.int32(0))
    first_B = jnp.copy(plain.tokens[:, 0]) if job.max_new_tokens else jnp.zeros_like(drafted)
    return setup, Progress(state.cache, state.done_B, first_B, result)


def check_drafts(config: ModelConfig, draft_loops: int, draft_tokens: int, options: Options) -> None:
    """Raises ValueError for drafts that cannot be made, and options of `generate` that they would have to ignore."""
    temperature, loop_cache = options.get("temperature", 0), options.get("loop_cache", "all")
    check(temperature == 0, "temperature", temperature, "0 (greedy) with draft_loops")
    loops, limit, halting = options.get("loops") or config.loops, config.max_seq_len - 1, options.get("halting")
    exact = loop_cache_for(config, loop_cache, loops) == "all"
    check(exact, "loop_cache", loop_cache, "all (a slot for each loop) with draft_loops")
    check(1 <= draft_loops <= loops, "draft_loops", draft_loops, f"1 to loops, {loops}")
    check(1 <= draft_tokens <= limit, "draft_tokens", draft_tokens, f"1 to {limit}, one below max_seq_len")
    if halting is not None:
        known = f"{', '.join(STATE_CRITERIA)} with draft_loops (criteria that look at the state only)"
        check(halting.criterion in STATE_CRITERIA, "halting criterion", repr(halting.criterion), known)


@partial(jax.jit, static_argnames=("draft_loops", "draft_tokens"), donate_argnames="progress")
def _decode(setup: Setup, progress: Progress, until: jax.Array, draft_loops: int, draft_tokens: int) -> Progress:
    """Runs rounds until there were `until` of them, or every row is done."""

    def done(progress: Progress) -> Progress:
        full_B = progress.result.lengths >= progress.result.tokens.shape[1]
        return progress.replace(done_B=progress.done_B | full_B)

    def body(progress: Progress) -> Progress:
        return done(_round(setup, progress, draft_loops, draft_tokens))

    def unfinished(progress: Progress) -> jax.Array:
        return (progress.result.rounds < until) & ~progress.done_B.all()

    return jax.lax.while_loop(unfinished, body, done(progress))


def _round(setup: Setup, progress: Progress, draft_loops: int, draft_tokens: int) -> Progress:
    """Drafts, verifies, and keeps what full depth confirms."""
    start_B, running_B = progress.cache.length_B, ~progress.done_B
    tokens_BN, states, cache = _draft(setup, progress, draft_loops, draft_tokens)
    truth_BN, loops_BN, cache = _verify(setup, states, cache, draft_loops)
    agree_Bn = tokens_BN[:, 1:] == truth_BN[:, :-1]
    accepted_B = jnp.cumprod(agree_Bn, axis=1, dtype=jnp.int32).sum(1)

    # New tokens: the confirmed ones and the correct one after them, up to a stop token or the end of the result.
    result, step_N = progress.result, jnp.arange(draft_tokens + 1)
    stops_BN = jnp.isin(truth_BN, setup.stop_tokens)
    first_stop_B = jnp.where(stops_BN.any(1), stops_BN.argmax(1), draft_tokens + 1)
    left_B = result.tokens.shape[1] - result.lengths
    new_B = jnp.minimum(jnp.minimum(accepted_B, first_stop_B) + 1, left_B) * running_B
    rows_B1, at_BN = jnp.arange(len(new_B))[:, None], result.lengths[:, None] + step_N
    at_BN = jnp.where(step_N < new_B[:, None], at_BN, result.tokens.shape[1])  # out of bounds: not written
    last_B1 = jnp.maximum(new_B - 1, 0)[:, None]
    return Progress(
        cache=cache.replace(length_B=start_B + new_B),
        done_B=progress.done_B | (first_stop_B < new_B),
        token_B=jnp.take_along_axis(truth_BN, last_B1, axis=1)[:, 0],
        result=SpeculativeResult(
            tokens=result.tokens.at[rows_B1, at_BN].set(truth_BN, mode="drop"),
            lengths=result.lengths + new_B,
            loops=result.loops.at[rows_B1, at_BN].set(loops_BN, mode="drop"),
            drafted=result.drafted + draft_tokens * running_B,
            accepted=result.accepted + accepted_B * running_B,
            rounds=result.rounds + 1,
        ),
    )


def _draft(
    setup: Setup, progress: Progress, draft_loops: int, draft_tokens: int
) -> tuple[jax.Array, TokenState, Cache]:
    """Each row's last token and the drafts after it, int32 [B, 1 + draft_tokens]; their states after `draft_loops`
    loops; and the cache with their keys and values so far."""
    running_B1 = ~progress.done_B[:, None]

    def step(carry: tuple[Cache, jax.Array], _: Any) -> tuple[tuple[Cache, jax.Array], tuple[jax.Array, TokenState]]:
        cache, token_B = carry

        def forward(model: Mythos) -> tuple[TokenState, Output]:
            seed_B, start = setup.sampling.seed_B, setup.initial_state
            tokens, filled = begin(model, cache, token_B[:, None], running_B1, seed_B, start)
            tokens, filled, _ = model.loop(tokens, filled, loops=setup.loops, halting=setup.halting, count=draft_loops)
            # A draft is better with all of its ACT weight, also where the model itself leaves some unspent.
            return tokens, model.finish(take_remainder(tokens), filled)

        tokens, out = apply(forward, setup.model, setup.variables)
        return (cast(Cache, out.cache), _argmax(out)[:, 0]), (token_B, tokens)

    carry = (progress.cache, progress.token_B)
    (cache, last_B), (before_nB, states_n) = jax.lax.scan(step, carry, length=draft_tokens)
    # The last draft runs its first loops as well. The compiler sees that nobody uses its coda.
    (last_cache, _), (_, last_state) = step((cache, last_B), None)
    cache = last_cache.replace(coda=cache.coda)
    tokens_BN = jnp.concatenate([before_nB.T, last_B[:, None]], axis=1)
    states = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), states_n)
    return tokens_BN, TokenState.join([states, last_state]), cache


def _verify(setup: Setup, states: TokenState, cache: Cache, draft_loops: int) -> tuple[jax.Array, jax.Array, Cache]:
    """Runs the drafted tokens on from `draft_loops` to full depth: the token that follows each, the loops that each
    ran, both int32 [B, N], and the cache."""

    def forward(model: Mythos) -> Output:
        tokens, new_cache, _ = model.loop(states, cache, loops=setup.loops, halting=setup.halting, start=draft_loops)
        return model.finish(tokens, new_cache)

    out = apply(forward, setup.model, setup.variables)
    return _argmax(out), out.loops, cast(Cache, out.cache)


def _argmax(out: Output) -> jax.Array:
    """The most likely next token after each, int32 [B, T]."""
    assert out.logits is not None
    return out.logits.argmax(-1).astype(jnp.int32)
