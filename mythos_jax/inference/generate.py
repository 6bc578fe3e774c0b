"""Generation: prefill in chunks, then one `while_loop` over tokens, both under jit, on a preallocated cache.

Both are made of `_next_token`: run the model on tokens, sample what follows the last one of every row. They only know
a `State`, so a long prompt is fed in chunks of one compiled size, and a stream decodes a few tokens per call (`decode`
stops at `until`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.inference.request import PREFILL_CHUNK, Lengths, Options, Seed, Tokens, check, prepare
from mythos_jax.inference.sampling import sample, starting_state
from mythos_jax.inference.state import GenerateResult, Job, Setup, State
from mythos_jax.model.apply import apply
from mythos_jax.model.cache import Cache
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import Output, TokenState

STREAM_TOKENS = 8  # decoded by one call of the device


def generate(
    model: Mythos,
    variables: Any,
    tokens_BT: Tokens,
    lengths: Lengths = None,
    *,
    max_new_tokens: int = 16,
    loops: int | None = None,
    halting: Halting | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    seed: Seed = 0,
    initial_state: str | None = None,
    loop_cache: str = "all",
    prefill_chunk: int = PREFILL_CHUNK,
) -> GenerateResult:
    """Continues a batch of prompts. Not to be traced: it looks at the prompts' values to refuse bad ones.

    tokens_BT: int [B, T], prompts aligned to the left. lengths: int [B], how many of a row's tokens are prompt
    (default: all T); the rest is never looked at.
    loops: the maximum per token (default: the config's). halting: a policy to stop earlier (one that looks at the
    logits applies to new tokens only).
    temperature: 0 is greedy; otherwise tokens are sampled among the `top_k` most likely (0: all), and of those among
    the smallest set of most likely tokens that holds the mass `top_p`.
    stop_tokens: a row ends with the first of them; generation ends with the last row.
    seed: one for all rows, or one per row. A row's result depends on its prompt and its seed alone, whatever batch it
    is in and however it is cut into chunks. Equal prompts with equal seeds continue alike, so pass one seed per row to
    sample a prompt several times.
    initial_state: "zeros" for models that start from noise; their noise is otherwise drawn from seed and position.
    loop_cache: how loops share the cache, "all" (they do not), "last", "first" or "modulo:N"; see
    `model.cache.loop_slots`. prefill_chunk: tokens of a prompt that are read by one call.

    Shapes, model, loops and the number of stop tokens are compiled in; other values, `lengths` too, reuse the program.
    Raises ValueError with one line that names the argument, what it got and what is allowed.
    """
    job = prepare(
        model,
        variables,
        tokens_BT,
        lengths,
        max_new_tokens=max_new_tokens,
        loops=loops,
        halting=halting,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        seed=seed,
        initial_state=initial_state,
        loop_cache=loop_cache,
        prefill_chunk=prefill_chunk,
    )
    state = job.state
    if max_new_tokens > 0:
        state = decode(job.setup, prefill_all(job), np.int32(max_new_tokens))
    return state.result


def stream(
    model: Mythos,
    variables: Any,
    tokens_BT: Tokens,
    lengths: Lengths = None,
    *,
    every: int = STREAM_TOKENS,
    keep: Callable[[Cache], None] | None = None,
    **options: Unpack[Options],
) -> Iterator[GenerateResult]:
    """Like `generate`, with its keywords and its errors (raised at once), but in pieces as they are decoded.

    Each piece is what came since the one before, in NumPy: tokens and loops int32 [B, n] with n up to `every`, and for
    each row how many of the n are its own. Concatenated, they are what `generate` returns. The first piece is the
    first token. The device is read once per piece, not per token.

    keep: is called before each piece with the cache, which is the caller's until the next piece is asked for.
    """
    check(every >= 1, "every", every, "an integer >= 1")
    return _pieces(prepare(model, variables, tokens_BT, lengths, **options), every, keep)


def _pieces(job: Job, every: int, keep: Callable[[Cache], None] | None) -> Iterator[GenerateResult]:
    if job.max_new_tokens == 0:
        return
    state, seen, before_B = prefill_all(job), 0, 0
    while True:
        result, step, done_B = jax.device_get((state.result, state.step, state.done_B))
        now_B = result.lengths
        if keep is not None:
            keep(state.cache)
        yield GenerateResult(result.tokens[:, seen:step], now_B - before_B, result.loops[:, seen:step])
        seen, before_B = int(step), now_B
        if done_B.all() or seen == job.max_new_tokens:
            return
        state = decode(job.setup, state, np.int32(min(seen + every, job.max_new_tokens)))


def prefill_all(job: Job) -> State:
    """The state after all chunks of the prompts: each row has its first new token."""
    state = job.state
    for tokens_BC, active_BC in job.chunks:
        state = prefill(job.setup, state, tokens_BC, active_BC)
    return state


@partial(jax.jit, donate_argnames="state")
def prefill(setup: Setup, state: State, tokens_BC: jax.Array, active_BC: jax.Array) -> State:
    """Reads a chunk of the prompts. A row's first new token is the one sampled in the chunk that ends its prompt."""
    # No halting by logits, also not in a chunk of one token: a prompt gives the same result however it is cut.
    loops, halting = (setup.loops, None) if setup.halting is None else setup.halting.for_prompt(setup.loops)
    cache, token_B, loops_B = _next_token(setup, state.cache, tokens_BC, active_BC, loops=loops, halting=halting)
    reads_B, result = active_BC.any(-1), state.result

    def first(x_BN: jax.Array, new_B: jax.Array) -> jax.Array:
        return x_BN.at[:, 0].set(jnp.where(reads_B, new_B, x_BN[:, 0]))

    return State(
        cache=cache,
        done_B=jnp.where(reads_B, jnp.isin(token_B, setup.stop_tokens), state.done_B),
        step=jnp.int32(1),
        result=result.replace(
            tokens=first(result.tokens, token_B),
            lengths=jnp.ones_like(result.lengths),
            loops=first(result.loops, loops_B),
        ),
    )


@partial(jax.jit, donate_argnames="state")
def decode(setup: Setup, state: State, until: int | jax.Array) -> State:
    """Samples tokens one by one until there are `until` of them, or every row is done."""

    def unfinished(state: State) -> jax.Array:
        return (state.step < until) & ~state.done_B.all()

    def body(state: State) -> State:
        running_B, result = ~state.done_B, state.result
        tokens_B1 = jax.lax.dynamic_slice_in_dim(result.tokens, state.step - 1, 1, axis=1)
        cache, token_B, loops_B = _next_token(
            setup, state.cache, tokens_B1, running_B[:, None], loops=setup.loops, halting=setup.halting
        )
        return State(
            cache=cache,
            done_B=state.done_B | jnp.isin(token_B, setup.stop_tokens),
            step=state.step + 1,
            result=result.replace(
                tokens=result.tokens.at[:, state.step].set(jnp.where(running_B, token_B, 0)),
                lengths=result.lengths + running_B,
                loops=result.loops.at[:, state.step].set(jnp.where(running_B, loops_B, 0)),
            ),
        )

    return jax.lax.while_loop(unfinished, body, state)


def _next_token(
    setup: Setup,
    cache: Cache,
    tokens_BT: jax.Array,
    active_BT: jax.Array,
    *,
    loops: int | jax.Array,
    halting: Halting | None,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Runs the model on the active tokens, which follow what the cache holds.

    Returns the cache, the token sampled to follow the last active one of each row, and the loops which that one ran;
    the last two are meaningless in a row without active tokens.
    """

    def forward(model: Mythos) -> tuple[Output, jax.Array]:
        tokens, filled = begin(model, cache, tokens_BT, active_BT, setup.sampling.seed_B, setup.initial_state)
        tokens, filled, _ = model.loop(tokens, filled, loops=loops, halting=halting)
        out = model.finish(tokens, filled, logits=False)
        # The head is the largest product of a small batch, and only one position of a row needs it.
        return out, model.head(jnp.take_along_axis(out.features, last_B1[..., None], axis=1))[:, 0]

    last_B1 = jnp.maximum(active_BT.sum(-1, keepdims=True) - 1, 0)
    out, logits_BV = apply(forward, setup.model, setup.variables)
    new_cache = cast(Cache, out.cache)
    token_B = sample(logits_BV, setup.sampling, new_cache.length_B)
    loops_B = jnp.take_along_axis(out.loops, last_B1, axis=1)[:, 0]
    return new_cache, token_B, loops_B


def begin(
    model: Mythos,
    cache: Cache,
    tokens_BT: jax.Array,
    active_BT: jax.Array,
    seed_B: jax.Array,
    initial_state: str | None = None,
) -> tuple[TokenState, Cache | None]:
    """`Mythos.begin` for the active tokens, which follow what the cache holds."""
    positions_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    start = starting_state(model.config, initial_state, seed_B, positions_BT)
    return model.begin(tokens_BT, initial_state=start, segment_ids=active_BT.astype(jnp.int32), cache=cache)
