"""Generation: prefill in chunks, then one `while_loop` over tokens, both under jit, on a preallocated cache.

Both are made of `_next_token`: run the model on tokens, draw what follows the last one of every row. They know only a
`State`, so a long prompt is fed in chunks of one compiled size, and a stream decodes a few tokens a call (`decode`
stops at `until`).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.inference.sampling import Sampling, position_noise, sample
from mythos_jax.model.cache import Cache, init_cache
from mythos_jax.model.halting import Halting, check_halting
from mythos_jax.model.mythos import Mythos, Output

PREFILL_CHUNK = 512  # tokens of a prompt that are read at a time
STREAM_TOKENS = 8  # decoded by one call of the device


@struct.dataclass
class GenerateResult:
    """What was generated; columns past a row's length are 0.

    tokens: int32 [B, N], the stop token included. lengths: int32 [B], new tokens of each row, the stop token
    included. loops: int32 [B, N], loops spent on predicting each token (those its predecessor ran).
    """

    tokens: jax.Array
    lengths: jax.Array
    loops: jax.Array


@struct.dataclass
class State:
    """A batch in the middle of generation: `step` tokens of each row that is not done have been drawn, all but the
    last of them stand in the cache."""

    cache: Cache
    done_B: jax.Array
    step: jax.Array
    result: GenerateResult


@struct.dataclass
class Setup:
    """What stays the same from token to token. Static fields compile anew when they change."""

    model: Mythos = struct.field(pytree_node=False)
    loops: int = struct.field(pytree_node=False)
    initial_state: str | None = struct.field(pytree_node=False)
    variables: Any
    halting: Halting | None
    sampling: Sampling
    stop_tokens: jax.Array  # int32 [n]


@struct.dataclass
class Job:
    """What `generate` and `stream` start from: checked arguments, an empty state, and the prompts cut into chunks."""

    setup: Setup
    state: State
    chunks: list[tuple[np.ndarray, np.ndarray]]  # of tokens and of which are active, [B, C] each


def generate(
    model: Mythos,
    variables: Any,
    tokens_BT: jax.Array | np.ndarray | Sequence[Sequence[int]],
    lengths: jax.Array | np.ndarray | Sequence[int] | None = None,
    max_new_tokens: int = 16,
    loops: int | None = None,
    halting: Halting | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] | np.ndarray = 0,
    initial_state: str | None = None,
    loop_cache_slots: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> GenerateResult:
    """Continues a batch of prompts. Not to be traced: it looks at the prompts' values to refuse bad ones.

    tokens_BT: int [B, T], prompts from the left; lengths: int [B], how many of a row's tokens are prompt (default:
    all T), the rest is never looked at. loops: at most this many per token (default: the config's); halting: a policy
    to stop earlier (one that looks at the logits: for new tokens alone). temperature 0 is greedy; else tokens are drawn
    among the `top_k` likeliest (0: all), then among the fewest likeliest that hold the mass `top_p`. A row ends with
    the first of `stop_tokens`; generation ends with the last row. seed: one for all rows or one a row. A row's result
    is a function of its prompt and its seed alone, whatever batch it is in and however it is cut into chunks; equal
    prompts with equal seeds continue alike, so give a seed a row to sample one prompt several times. initial_state:
    "zeros" for models that start from noise; their noise is otherwise drawn from seed and position. loop_cache_slots:
    see `init_cache`; what comes is then an approximation. prefill_chunk: tokens of a prompt that are read at a time.

    Shapes, model, loops and the number of stop tokens are compiled in; other values, `lengths` too, reuse the program.
    Raises ValueError with one line that names the argument, what it got and what is allowed.
    """
    job = _prepare(
        model,
        variables,
        tokens_BT,
        lengths,
        max_new_tokens,
        loops=loops,
        halting=halting,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        seed=seed,
        initial_state=initial_state,
        loop_cache_slots=loop_cache_slots,
        prefill_chunk=prefill_chunk,
    )
    state = job.state
    if max_new_tokens > 0:
        state = decode(job.setup, _prefill_all(job), np.int32(max_new_tokens))
    return state.result


def stream(
    model: Mythos,
    variables: Any,
    tokens_BT: jax.Array | np.ndarray | Sequence[Sequence[int]],
    lengths: jax.Array | np.ndarray | Sequence[int] | None = None,
    max_new_tokens: int = 16,
    *,
    every: int = STREAM_TOKENS,
    **keywords: Any,
) -> Iterator[GenerateResult]:
    """Like `generate`, with its keywords and its errors (at once), but in pieces as they are decoded.

    Each piece is what came since the one before, in NumPy: tokens and loops int32 [B, n], n up to `every`, and of each
    row how many of the n are its own. Put side by side they are what `generate` returns. The first piece is the first
    token. The device is asked once a piece, never for a token.
    """
    _require(every >= 1, "every", every, "an integer >= 1")
    job = _prepare(model, variables, tokens_BT, lengths, max_new_tokens, **keywords)
    return _pieces(job, max_new_tokens, every)


def _pieces(job: Job, max_new_tokens: int, every: int) -> Iterator[GenerateResult]:
    if max_new_tokens == 0:
        return
    state, seen, before_B = _prefill_all(job), 0, 0
    while True:
        result, step, done_B = jax.device_get((state.result, state.step, state.done_B))
        now_B = result.lengths
        yield GenerateResult(result.tokens[:, seen:step], now_B - before_B, result.loops[:, seen:step])
        seen, before_B = int(step), now_B
        if done_B.all() or seen == max_new_tokens:
            return
        state = decode(job.setup, state, np.int32(min(seen + every, max_new_tokens)))


def _prepare(
    model: Mythos,
    variables: Any,
    tokens_BT: Any,
    lengths: Any = None,
    max_new_tokens: int = 16,
    loops: int | None = None,
    halting: Halting | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    seed: Any = 0,
    initial_state: str | None = None,
    loop_cache_slots: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Job:
    """Checks the arguments of `generate`."""
    config = model.config
    loops = config.loops if loops is None else loops
    tokens_BT, lengths_B = _check_prompts(config, tokens_BT, lengths, max_new_tokens)
    stop_tokens = _check_tokens("stop_tokens", np.asarray(stop_tokens, np.int64).reshape(-1), config)
    sampling = _check_sampling(config, temperature, top_k, top_p, seed, len(tokens_BT))
    _require(loops >= 1, "loops", loops, "an integer >= 1")
    _require(initial_state in (None, "zeros"), "initial_state", initial_state, "'zeros' or None")
    _require(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "an integer >= 1")
    slots = loop_cache_slots
    _require(slots is None or slots >= 1, "loop_cache_slots", slots, "an integer >= 1, or None")
    check_halting(config, halting, cached=True)

    B, T = tokens_BT.shape
    size = min(T, prefill_chunk)
    # Chunks that no row reaches are not read, and those that are read have one size: lengths compile nothing.
    starts = range(0, int(lengths_B.max()), size)
    padded_BT = np.pad(tokens_BT, ((0, 0), (0, -T % size)))
    active_BT = np.arange(padded_BT.shape[1]) < lengths_B[:, None]
    state = State(
        # With a slot for each loop nothing is shared, however many may be had.
        cache=init_cache(config, B, T + max_new_tokens, loops, slots if slots and slots < loops else None),
        done_B=jnp.zeros(B, bool),
        step=jnp.int32(0),
        result=GenerateResult(
            tokens=jnp.zeros((B, max_new_tokens), jnp.int32),
            lengths=jnp.zeros(B, jnp.int32),
            loops=jnp.zeros((B, max_new_tokens), jnp.int32),
        ),
    )
    setup = Setup(model, loops, initial_state, variables, halting, sampling, stop_tokens)
    return Job(setup, state, [(padded_BT[:, t : t + size], active_BT[:, t : t + size]) for t in starts])


def _prefill_all(job: Job) -> State:
    state = job.state
    for tokens_BC, active_BC in job.chunks:
        state = prefill(job.setup, state, tokens_BC, active_BC)
    return state


@partial(jax.jit, donate_argnames="state")
def prefill(setup: Setup, state: State, tokens_BC: jax.Array, active_BC: jax.Array) -> State:
    """Reads a chunk of the prompts. The first token of each row is the one drawn in the chunk that ends its prompt."""
    # Prompts are alike whatever chunks they come in, also of a single token: no halting by logits here.
    if setup.halting is not None and setup.halting.reads_logits:
        policy = {"loops": setup.halting.most(setup.loops), "halting": None}
    else:
        policy = {"loops": setup.loops, "halting": setup.halting}
    cache, token_B, loops_B = _next_token(setup, state.cache, tokens_BC, active_BC, **policy)
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
    """Draws tokens one by one until there are `until` of them, or every row is done."""

    def go_on(state: State) -> jax.Array:
        return (state.step < until) & ~state.done_B.all()

    def body(state: State) -> State:
        going_B, result = ~state.done_B, state.result
        tokens_B1 = jax.lax.dynamic_slice_in_dim(result.tokens, state.step - 1, 1, axis=1)
        cache, token_B, loops_B = _next_token(
            setup, state.cache, tokens_B1, going_B[:, None], loops=setup.loops, halting=setup.halting
        )
        return State(
            cache=cache,
            done_B=state.done_B | jnp.isin(token_B, setup.stop_tokens),
            step=state.step + 1,
            result=result.replace(
                tokens=result.tokens.at[:, state.step].set(jnp.where(going_B, token_B, 0)),
                lengths=result.lengths + going_B,
                loops=result.loops.at[:, state.step].set(jnp.where(going_B, loops_B, 0)),
            ),
        )

    return jax.lax.while_loop(go_on, body, state)


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

    Returns the cache, the token drawn to follow the last active one of each row, and the loops that one ran; the last
    two mean nothing in a row without active tokens.
    """
    out = run_trunk(setup, cache, tokens_BT, active_BT, loops=loops, halting=halting)
    last_B1 = jnp.maximum(active_BT.sum(-1, keepdims=True) - 1, 0)
    features_B1D = jnp.take_along_axis(out.features, last_B1[..., None], axis=1)
    logits_BV = setup.model.apply(setup.variables, features_B1D, method="head")[:, 0]
    token_B = sample(logits_BV, setup.sampling, out.cache.length_B)
    loops_B = jnp.take_along_axis(out.loops, last_B1, axis=1)[:, 0]
    return out.cache, token_B, loops_B


def run_trunk(
    setup: Setup, cache: Cache, tokens_BT: jax.Array, active_BT: jax.Array, *, resume: Any = None, **keywords: Any
) -> Output:
    """The model, without its head, on the active tokens, which follow what the cache holds; keywords as in `trunk`."""
    initial_state, config = setup.initial_state, setup.model.config
    if initial_state is None and config.initial_state == "noise" and resume is None:
        positions_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
        initial_state = position_noise(config, setup.sampling.seed_B, positions_BT)
    return setup.model.apply(
        setup.variables,
        tokens_BT,
        initial_state=initial_state,
        segment_ids=active_BT.astype(jnp.int32),
        cache=cache,
        resume=resume,
        method="trunk",
        **keywords,
    )


def _check_prompts(config: ModelConfig, tokens_BT, lengths, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts, zeros where they are padding, and their lengths, both int32."""
    try:
        tokens_BT = np.asarray(tokens_BT)
    except ValueError:
        raise ValueError("tokens: got rows of different lengths, allowed: [B, T] padded on the right") from None
    _require(tokens_BT.ndim == 2, "tokens", f"shape {tokens_BT.shape}", "[B, T]")
    B, T = tokens_BT.shape
    _require(B >= 1 and T >= 1, "tokens", f"shape {tokens_BT.shape}, an empty prompt", "at least one token a row")
    _require(np.issubdtype(tokens_BT.dtype, np.integer), "tokens", tokens_BT.dtype, "integers")
    lengths_B = np.full(B, T) if lengths is None else np.asarray(lengths)
    _require(lengths_B.shape == (B,), "lengths", f"shape {lengths_B.shape}", f"one for each of the {B} rows")
    bad = lengths_B[(lengths_B < 1) | (lengths_B > T)]
    _require(not bad.size, "lengths", bad[:1].tolist(), f"from 1 (no prompt is empty) to {T}, the width of tokens")
    _require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "an integer >= 0")
    _require(
        max(T, lengths_B.max() + max_new_tokens) <= config.max_seq_len,
        "prompt",
        f"{max(T, lengths_B.max())} tokens and {max_new_tokens} new ones",
        f"at most max_seq_len, {config.max_seq_len}, together",
    )
    active_BT = np.arange(T) < lengths_B[:, None]
    return _check_tokens("tokens", np.where(active_BT, tokens_BT, 0), config), lengths_B.astype(np.int32)


def _check_sampling(config: ModelConfig, temperature: float, top_k: int, top_p: float, seed, B: int) -> Sampling:
    _require(0 <= temperature < np.inf, "temperature", temperature, "a number >= 0")
    _require(0 <= top_k <= config.vocab_size, "top_k", top_k, f"0 (all) to the vocabulary size, {config.vocab_size}")
    _require(0 < top_p <= 1, "top_p", top_p, "a number in (0, 1]")
    seed = np.asarray(seed)
    _require(seed.shape in [(), (B,)], "seed", f"shape {seed.shape}", f"one integer, or one for each of the {B} rows")
    _require(
        np.issubdtype(seed.dtype, np.integer) and (0 <= seed).all() and (seed < 2**32).all(),
        "seed",
        seed.tolist(),
        "integers from 0 to 2^32 - 1",
    )
    seed_B = np.broadcast_to(seed, B).astype(np.uint32)
    return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p), seed_B)


def _check_tokens(name: str, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    bad = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    _require(not bad.size, name, bad[:1].tolist(), f"0 to {config.vocab_size - 1}, the vocabulary")
    return tokens.astype(np.int32)


def _require(ok: bool, name: str, got: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got}, allowed: {allowed}")
