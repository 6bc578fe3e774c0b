"""The arguments of generation: what may be asked for, and the checks that turn a request into a `Job`."""

from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.inference.sampling import Sampling
from mythos_jax.inference.state import GenerateResult, Job, Setup, State
from mythos_jax.model.cache import Cache, init_cache, loop_cache_for
from mythos_jax.model.halting import Halting, check_halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.predictor import check_predictor

PREFILL_CHUNK = 512  # tokens of a prompt that are read by one call

Tokens = jax.Array | np.ndarray | Sequence[Sequence[int]]
Lengths = jax.Array | np.ndarray | Sequence[int] | None
Seed = int | Sequence[int] | np.ndarray


class Options(TypedDict, total=False):
    """The keywords that `generate`, `stream` and `speculate` share; `generate` says what they mean.

    room: of `stream` only, new tokens to make room for (default: max_new_tokens); with the same room, requests for
    different numbers of tokens share a program.
    cache: of `stream` only, what a request with the same keywords, width and room has left, cut back to the tokens that
    all rows begin with, which are then not read again.
    """

    max_new_tokens: int
    loops: int | None
    halting: Halting | None
    temperature: float
    top_k: int
    top_p: float
    stop_tokens: Sequence[int]
    seed: Seed
    initial_state: str | None
    loop_cache: str
    prefill_chunk: int
    room: int
    cache: Cache | None


def prepare(
    model: Mythos,
    variables: Any,
    tokens_BT: Tokens,
    lengths: Lengths,
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
    room: int | None = None,
    cache: Cache | None = None,
) -> Job:
    """Checks a request. Raises ValueError with one line that names the argument, what it got and what is allowed."""
    config = model.config
    loops = config.loops if loops is None else loops
    tokens_BT, lengths_B = check_prompts(config, tokens_BT, lengths, max_new_tokens)
    stops = check_tokens("stop_tokens", np.asarray(stop_tokens, np.int64).reshape(-1), config)
    sampling = check_sampling(config, temperature, top_k, top_p, seed, len(tokens_BT))
    check_depth(config, variables, loops, halting)
    check(initial_state in (None, "zeros"), "initial_state", initial_state, "'zeros' or None")
    check(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "an integer >= 1")
    loop_cache = loop_cache_for(config, loop_cache, loops)

    (B, T), N = tokens_BT.shape, max_new_tokens if room is None else max(room, max_new_tokens)
    size = min(T, prefill_chunk)
    # Chunks that no row reaches are not read, and those that are read have one size: lengths compile nothing.
    starts = range(0 if cache is None else int(cache.length_B[0]), int(lengths_B.max()), size)
    padded_BT = np.pad(tokens_BT, ((0, 0), (0, size)))
    active_BT = np.arange(padded_BT.shape[1]) < lengths_B[:, None]
    if cache is None:
        # No row is longer than max_seq_len, whatever the padding of the prompts.
        cache = init_cache(config, B, min(T + N, config.max_seq_len), loops, loop_cache)
    state = State(
        cache=cache,
        done_B=jnp.zeros(B, bool),
        step=jnp.int32(0),
        result=GenerateResult(
            tokens=jnp.zeros((B, N), jnp.int32),
            lengths=jnp.zeros(B, jnp.int32),
            loops=jnp.zeros((B, N), jnp.int32),
        ),
    )
    setup = Setup(model, loops, initial_state, variables, halting, sampling, stops)
    chunks = [(padded_BT[:, t : t + size], active_BT[:, t : t + size]) for t in starts]
    return Job(setup, state, chunks, max_new_tokens)


def check_depth(config: ModelConfig, variables: Any, loops: int, halting: Halting | None) -> None:
    """Raises ValueError for numbers of loops and policies that decoding with this model cannot follow."""
    check(loops >= 1, "loops", loops, "an integer >= 1")
    check_halting(config, halting, cached=True)
    check_predictor(halting, variables)


def check_prompts(
    config: ModelConfig, tokens_BT: Tokens, lengths: Lengths, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts, zeros where they are padding, and their lengths, both int32."""
    try:
        tokens_BT = np.asarray(tokens_BT)
    except ValueError:
        raise ValueError("tokens: got rows of different lengths, allowed: [B, T] padded on the right") from None
    check(tokens_BT.ndim == 2, "tokens", f"shape {tokens_BT.shape}", "[B, T]")
    B, T = tokens_BT.shape
    check(B >= 1 and T >= 1, "tokens", f"shape {tokens_BT.shape}, an empty prompt", "at least one token per row")
    check(np.issubdtype(tokens_BT.dtype, np.integer), "tokens", tokens_BT.dtype, "integers")
    lengths_B = np.full(B, T) if lengths is None else np.asarray(lengths)
    check(lengths_B.shape == (B,), "lengths", f"shape {lengths_B.shape}", f"one for each of the {B} rows")
    bad = lengths_B[(lengths_B < 1) | (lengths_B > T)]
    check(not bad.size, "lengths", bad[:1].tolist(), f"from 1 (no prompt is empty) to {T}, the width of tokens")
    check(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "an integer >= 0")
    longest, limit = int(lengths_B.max()), config.max_seq_len
    check(
        longest + max_new_tokens <= limit,
        "prompt",
        f"{longest} tokens and {max_new_tokens} new ones",
        f"at most max_seq_len, {limit}, together",
    )
    check(T <= limit, "tokens", f"{T} columns", f"at most max_seq_len, {limit}, padding included")
    active_BT = np.arange(T) < lengths_B[:, None]
    return check_tokens("tokens", np.where(active_BT, tokens_BT, 0), config), lengths_B.astype(np.int32)


def check_sampling(config: ModelConfig, temperature: float, top_k: int, top_p: float, seed: Seed, B: int) -> Sampling:
    """The numbers of `Sampling` for B rows."""
    check(0 <= temperature < np.inf, "temperature", temperature, "a number >= 0")
    check(0 <= top_k <= config.vocab_size, "top_k", top_k, f"0 (all) to the vocabulary size, {config.vocab_size}")
    check(0 < top_p <= 1, "top_p", top_p, "a number in (0, 1]")
    seed = np.asarray(seed)
    check(seed.shape in [(), (B,)], "seed", f"shape {seed.shape}", f"one integer, or one for each of the {B} rows")
    check(
        bool(np.issubdtype(seed.dtype, np.integer) and (0 <= seed).all() and (seed < 2**32).all()),
        "seed",
        seed.tolist(),
        "integers from 0 to 2^32 - 1",
    )
    # NumPy, so that the numbers go wherever the model is.
    given = (temperature, np.float32), (top_k, np.int32), (top_p, np.float32), (seed, np.uint32)
    numbers: Any = [np.broadcast_to(value, B).astype(dtype) for value, dtype in given]
    return Sampling(*numbers)


def check_tokens(name: str, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The tokens as int32."""
    bad = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    check(not bad.size, name, bad[:1].tolist(), f"0 to {config.vocab_size - 1}, the vocabulary")
    return tokens.astype(np.int32)


def check(ok: bool, name: str, got: Any, allowed: str) -> None:
    """Raises ValueError with the line that users see."""
    if not ok:
        raise ValueError(f"{name}: got {got}, allowed: {allowed}")
