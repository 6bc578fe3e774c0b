"""Self-speculative decoding: a draft is the first part of the model's own computation.

A round drafts n tokens one by one with `draft_loops` loops each. The tokens' states, keys and values at that depth are
kept, and all of them go on from there together to full depth: a loop over n + 1 tokens costs little more than one over
a single token, and no loop is computed twice. What full depth confirms stands, with the correct token after it; the
cache's length goes back over the rest. The result is that of plain greedy decoding.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mythos_jax.inference.generate import (
    PREFILL_CHUNK,
    GenerateResult,
    Setup,
    _prefill_all,
    _prepare,
    _require,
    run_trunk,
)
from mythos_jax.model.cache import Cache
from mythos_jax.model.halting import STATE_CRITERIA, Halting
from mythos_jax.model.mythos import Mythos, Output

STREAM_ROUNDS = 4  # of one call of the device


@struct.dataclass
class SpeculativeResult(GenerateResult):
    """As `GenerateResult`, and how the drafts did.

    drafted, accepted: int32 [B], tokens of each row that were drafted, and of those the ones that full depth confirmed.
    rounds: int32 [], how often tokens were verified.
    """

    drafted: jax.Array
    accepted: jax.Array
    rounds: jax.Array

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were confirmed; 0 where none was drafted."""
        return float(self.accepted.sum() / max(int(self.drafted.sum()), 1))


@struct.dataclass
class Progress:
    """A batch between two rounds: `token_B`, the last of each row, is not in the cache yet, all before it are."""

    cache: Cache
    done_B: jax.Array
    token_B: jax.Array
    result: SpeculativeResult


def speculate(
    model: Mythos,
    variables: Any,
    tokens_BT: jax.Array | np.ndarray | Sequence[Sequence[int]],
    lengths: jax.Array | np.ndarray | Sequence[int] | None = None,
    max_new_tokens: int = 16,
    loops: int | None = None,
    halting: Halting | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] | np.ndarray = 0,
    initial_state: str | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    *,
    draft_loops: int,
    draft_tokens: int = 3,
) -> SpeculativeResult:
    """Greedy tokens as `generate` gives them with the same arguments, in less time where drafts are mostly right.

    draft_loops: loops of a draft, 1 to `loops`. draft_tokens: drafts a round. halting: a policy that looks at the
    state only; a token that has halted by `draft_loops` is final, one that halts later goes on.
    Raises ValueError with one line that names the argument, what it got and what is allowed.
    """
    setup, progress = _start(
        model,
        variables,
        tokens_BT,
        lengths,
        max_new_tokens,
        draft_loops,
        draft_tokens,
        loops=loops,
        halting=halting,
        stop_tokens=stop_tokens,
        seed=seed,
        initial_state=initial_state,
        prefill_chunk=prefill_chunk,
    )
    if max_new_tokens > 0:  # a round adds one token at least
        progress = _decode(setup, progress, np.int32(max_new_tokens), draft_loops, draft_tokens)
    return progress.result


def stream_drafts(
    model: Mythos,
    variables: Any,
    tokens_BT: Any,
    lengths: Any = None,
    max_new_tokens: int = 16,
    *,
    draft_loops: int,
    draft_tokens: int = 3,
    every: int = STREAM_ROUNDS,
    **keywords: Any,
) -> Iterator[SpeculativeResult]:
    """Like `speculate`, but in pieces of up to `every` rounds, as `stream` gives them: of each row how many of the
    piece's tokens are its own. drafted, accepted and rounds count from the start."""
    setup, progress = _start(
        model, variables, tokens_BT, lengths, max_new_tokens, draft_loops, draft_tokens, **keywords
    )
    return _pieces(setup, progress, draft_loops, draft_tokens, every)


def _pieces(
    setup: Setup, progress: Progress, draft_loops: int, draft_tokens: int, every: int
) -> Iterator[SpeculativeResult]:
    before_B = 0
    while True:
        result, done_B = jax.device_get((progress.result, progress.done_B))
        new_B = result.lengths - before_B
        place_N = np.arange(new_B.max(initial=0))
        at_BN = np.minimum((result.lengths - new_B)[:, None] + place_N, max(result.tokens.shape[1] - 1, 0))
        tokens, loops = (
            np.where(place_N < new_B[:, None], np.take_along_axis(x, at_BN, axis=1), 0)
            for x in (result.tokens, result.loops)
        )
        if len(place_N):
            yield result.replace(tokens=tokens, loops=loops, lengths=new_B)
        if done_B.all() or (result.lengths == result.tokens.shape[1]).all():
            return
        before_B = result.lengths
        progress = _decode(setup, progress, result.rounds + np.int32(every), draft_loops, draft_tokens)


def _start(
    model: Mythos,
    variables: Any,
    tokens_BT: Any,
    lengths: Any,
    max_new_tokens: int,
    draft_loops: int,
    draft_tokens: int,
    *,
    halting: Halting | None = None,
    loop_cache_slots: int | None = None,
    **keywords: Any,
) -> tuple[Setup, Progress]:
    """Checks the arguments and reads the prompts."""
    job = _prepare(model, variables, tokens_BT, lengths, max_new_tokens, halting=halting, **keywords)
    setup, most = job.setup, model.config.max_seq_len - 1
    _require(1 <= draft_loops <= setup.loops, "draft_loops", draft_loops, f"1 to loops, {setup.loops}")
    _require(1 <= draft_tokens <= most, "draft_tokens", draft_tokens, f"1 to {most}, one below max_seq_len")
    _require(loop_cache_slots is None, "loop_cache_slots", loop_cache_slots, "None with draft_loops")
    if halting is not None:
        allowed = f"{', '.join(STATE_CRITERIA)} with draft_loops (criteria that look at the state only)"
        _require(halting.criterion in STATE_CRITERIA, "halting criterion", repr(halting.criterion), allowed)
    state = _prefill_all(job) if max_new_tokens else job.state
    plain, (drafted, accepted) = state.result, (jnp.zeros(len(state.done_B), jnp.int32) for _ in range(2))
    result = SpeculativeResult(plain.tokens, plain.lengths, plain.loops, drafted, accepted, rounds=jnp.int32(0))
    first_B = jnp.copy(plain.tokens[:, 0]) if max_new_tokens else jnp.zeros_like(drafted)
    return setup, Progress(state.cache, state.done_B, first_B, result)


@partial(jax.jit, static_argnames=("draft_loops", "draft_tokens"), donate_argnames="progress")
def _decode(setup: Setup, progress: Progress, until: jax.Array, draft_loops: int, draft_tokens: int) -> Progress:
    """Rounds until there were `until` of them or every row is done."""

    def done(progress: Progress) -> Progress:
        full_B = progress.result.lengths >= progress.result.tokens.shape[1]
        return progress.replace(done_B=progress.done_B | full_B)

    def body(progress: Progress) -> Progress:
        return done(_round(setup, progress, draft_loops, draft_tokens))

    def go_on(progress: Progress) -> jax.Array:
        return (progress.result.rounds < until) & ~progress.done_B.all()

    return jax.lax.while_loop(go_on, body, done(progress))


def _round(setup: Setup, progress: Progress, draft_loops: int, draft_tokens: int) -> Progress:
    """Drafts, verifies, and keeps what full depth confirms."""
    start_B, going_B = progress.cache.length_B, ~progress.done_B

    def step(carry, _):
        cache, token_B = carry
        out = _advance(setup, cache, token_B[:, None], going_B, pause=draft_loops)
        return (out.cache, _greedy(setup, out)[:, 0]), (token_B, out.paused)

    (cache, last_B), (drafts_nB, paused_n) = jax.lax.scan(step, (progress.cache, progress.token_B), length=draft_tokens)
    # The last draft runs its first loops too; that its coda is not used, the compiler sees.
    out = _advance(setup, cache, last_B[:, None], going_B, pause=draft_loops)
    cache = out.cache.replace(coda=cache.coda, length_B=start_B)
    tokens_BN = jnp.concatenate([drafts_nB.T, last_B[:, None]], axis=1)
    paused = jax.tree.map(
        lambda before, last: jnp.concatenate([jnp.moveaxis(before[:, :, 0], 0, 1), last], axis=1), paused_n, out.paused
    )

    out = _advance(setup, cache, tokens_BN, going_B, resume=paused)
    truth_BN = _greedy(setup, out)
    agree_Bn = tokens_BN[:, 1:] == truth_BN[:, :-1]
    accepted_B = jnp.cumprod(agree_Bn, axis=1, dtype=jnp.int32).sum(1)

    # New tokens: those confirmed and the correct one after them, up to a stop token or the last place of the result.
    result, place_N = progress.result, jnp.arange(draft_tokens + 1)
    stops_BN = jnp.isin(truth_BN, setup.stop_tokens)
    first_stop_B = jnp.where(stops_BN.any(1), stops_BN.argmax(1), draft_tokens + 1)
    new_B = jnp.minimum(jnp.minimum(accepted_B, first_stop_B) + 1, result.tokens.shape[1] - result.lengths) * going_B
    rows_B1, at_BN = jnp.arange(len(new_B))[:, None], result.lengths[:, None] + place_N
    at_BN = jnp.where(place_N < new_B[:, None], at_BN, result.tokens.shape[1])  # out of bounds: not written
    last_B1 = jnp.maximum(new_B - 1, 0)[:, None]
    return Progress(
        cache=out.cache.replace(length_B=start_B + new_B),
        done_B=progress.done_B | (first_stop_B < new_B),
        token_B=jnp.take_along_axis(truth_BN, last_B1, axis=1)[:, 0],
        result=SpeculativeResult(
            tokens=result.tokens.at[rows_B1, at_BN].set(truth_BN, mode="drop"),
            lengths=result.lengths + new_B,
            loops=result.loops.at[rows_B1, at_BN].set(out.loops, mode="drop"),
            drafted=result.drafted + draft_tokens * going_B,
            accepted=result.accepted + accepted_B * going_B,
            rounds=result.rounds + 1,
        ),
    )


def _advance(setup: Setup, cache: Cache, tokens_BT: jax.Array, going_B: jax.Array, **keywords: Any) -> Output:
    """The model, without its head, on tokens of the rows that are still going."""
    active_BT = jnp.broadcast_to(going_B[:, None], tokens_BT.shape)
    return run_trunk(setup, cache, tokens_BT, active_BT, loops=setup.loops, halting=setup.halting, **keywords)


def _greedy(setup: Setup, out: Output) -> jax.Array:
    """The likeliest next token after each, int32 [B, T]."""
    return setup.model.apply(setup.variables, out.features, method="head").argmax(-1).astype(jnp.int32)
