"""Text in, text out: prompts continued as they are decoded, and the logits of a text."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.flops import cache_bytes
from mythos_jax.inference.detokenizer import StreamingDetokenizer
from mythos_jax.inference.generate import stream
from mythos_jax.inference.request import PREFILL_CHUNK, Seed
from mythos_jax.inference.sampling import starting_state
from mythos_jax.inference.speculative import SpeculativeResult, stream_drafts
from mythos_jax.inference.state import GenerateResult
from mythos_jax.model.apply import apply
from mythos_jax.model.cache import Cache
from mythos_jax.model.halting import Halting, check_halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import Output
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import replicate, use_mesh

MOST_TOKENS = 128  # new ones, if a request does not say how many
MIN_WIDTH = 32  # of prompts, and the smallest step between their widths

Piece = TypeVar("Piece", str, list[str])


@dataclass
class GenerationStats:
    """What generation took, updated as the pieces of a `TextStream` are consumed.

    loops: of each new token. timed_tokens, seconds: from the third piece on, when all programs are compiled.
    drafted, accepted: tokens, with self-speculation.
    """

    cache_bytes_per_token: int
    loops: list[int] = field(default_factory=list)
    timed_tokens: int = 0
    seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0

    @property
    def brief(self) -> str:
        """Tokens, loops per token and speed."""
        mean = f", {np.mean(self.loops):.2f} loops per token" if self.loops else ""
        speed = f", {self.timed_tokens / self.seconds:.1f} tokens/s" if self.timed_tokens else ""
        drafts = f", {self.accepted / self.drafted:.0%} of drafts accepted" if self.drafted else ""
        return f"{len(self.loops)} tokens{mean}{drafts}{speed}"

    def __str__(self) -> str:
        return f"{self.brief}, {self.cache_bytes_per_token:,} bytes of cache per token"


class TextStream(Iterator[Piece], Generic[Piece]):
    """Pieces of text as they are decoded, and the statistics of those consumed so far."""

    def __init__(self, pieces: Iterator[Piece], stats: GenerationStats):
        self._pieces: Iterator[Piece] = pieces
        self.stats = stats

    def __next__(self) -> Piece:
        return next(self._pieces)


class RowOptions(TypedDict, total=False):
    """Those keywords of `stream_texts`, which says what they mean, that tokens can be continued with."""

    loops: int | None
    halting: Halting | str | None
    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: Seed
    draft_loops: int | None
    draft_tokens: int
    initial_state: str | None
    loop_cache: str
    prefill_chunk: int


class TextOptions(RowOptions, total=False):
    """The keywords of `stream_texts`."""

    special_tokens: bool


def stream_texts(
    loaded: LoadedModel, texts: Sequence[str], *, special_tokens: bool = False, **options: Unpack[RowOptions]
) -> TextStream[list[str]]:
    """Continues texts as one batch, each up to a stop token, in pieces: one per text and yield.

    A continuation depends only on its text and seed, not on the batch. What a text starts with and which tokens stop it
    is what the model's files say (`LoadedModel.conventions`): in a run an end-of-document token, as in training.

    halting: a policy, also as text such as "latent:0.03".
    max_new_tokens: default: as many as fit after the longest text, at most 128.
    seed: one for all texts, or one per text.
    draft_loops: draft with this many loops, verify at full depth, `draft_tokens` at a time; greedy only, the same text.
    special_tokens: whether the name of a special token in a text, such as `<|im_start|>`, stands for that token.
    Other keywords: as in `inference.generate.generate`.

    Raises ConfigError, at once, for a text or a number that the model cannot take, or a model without a tokenizer.
    """
    text_tokenizer(loaded)
    rows = [_encode(loaded, text, special_tokens) for text in texts]
    return stream_rows(loaded, rows, stop_tokens=loaded.conventions.stop_tokens, **options)


def stream_rows(
    loaded: LoadedModel,
    rows: Sequence[Sequence[int]],
    *,
    stop_tokens: Sequence[int],
    width: int | None = None,
    most_tokens: int = MOST_TOKENS,
    cache: Cache | None = None,
    keep: Callable[[Cache], None] | None = None,
    loops: int | None = None,
    halting: Halting | str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: Seed = 0,
    draft_loops: int | None = None,
    draft_tokens: int = 3,
    initial_state: str | None = None,
    loop_cache: str = "all",
    prefill_chunk: int = PREFILL_CHUNK,
) -> TextStream[list[str]]:
    """The text that follows tokens. Keywords as in `stream_texts`.

    width: of the batch (default: few widths, so that few programs are compiled). most_tokens: new ones, if
    max_new_tokens does not say. cache, keep: as in `inference.generate.stream`; not with draft_loops.
    """
    config = loaded.config.model
    stats = GenerationStats(cache_bytes(config, loops or config.loops, loop_cache))
    if not rows:
        return TextStream(iter(()), stats)
    tokens_BT, lengths_B = _pad(rows, config.max_seq_len, width)
    drafts = draft_loops is not None
    options: dict[str, Any] = {
        "loops": loops,
        "halting": Halting.parse(halting) if isinstance(halting, str) else halting,
        **_new_tokens(max_new_tokens, config.max_seq_len, int(lengths_B.max()), drafts, most_tokens),
        "stop_tokens": stop_tokens,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "initial_state": initial_state,
        "loop_cache": loop_cache,
        "prefill_chunk": prefill_chunk,
        **({"draft_loops": draft_loops, "draft_tokens": draft_tokens} if drafts else {"cache": cache, "keep": keep}),
    }
    try:
        with use_mesh(loaded.mesh):
            decode = stream_drafts if drafts else stream
            results = decode(loaded.model, loaded.variables, tokens_BT, lengths_B, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    detokenizers = [StreamingDetokenizer(text_tokenizer(loaded), row) for row in rows]
    return TextStream(_decode(_on_mesh(loaded, results), detokenizers, set(stop_tokens), stats), stats)


def text_tokenizer(loaded: LoadedModel) -> Tokenizer:
    """Raises ConfigError for a model of a reasoning task with tokens of its own, or one without a tokenizer."""
    if not loaded.config.data.uses_tokenizer:
        task = loaded.config.data.task.name
        raise ConfigError(f"{loaded.directory}: was trained on task {task}, not on text; allowed: `mythos eval`")
    return loaded.require_tokenizer()


def _new_tokens(asked: int | None, max_len: int, longest: int, drafts: bool, most: int) -> dict[str, int]:
    """The number of new tokens, by default as many as fit. Without drafts, texts of all lengths then share a program,
    which has room for `room` of them."""
    if asked is not None:
        return {"max_new_tokens": asked}
    fitting = {"max_new_tokens": max(1, min(most, max_len - longest))}
    return fitting if drafts else {**fitting, "room": min(most, max_len)}


def _encode(loaded: LoadedModel, text: str, special_tokens: bool) -> list[int]:
    """A text's tokens, after those that a text starts with."""
    return loaded.conventions.begin(loaded.require_tokenizer().encode(text, special_tokens).tolist())


def _pad(rows: Sequence[Sequence[int]], max_width: int, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as int32 [B, T] with padding on the right, and lengths [B].

    T is `width` or one of few widths, at most `max_width`, but never less than the longest row.
    """
    lengths_B = np.array([len(row) for row in rows], np.int32)
    longest = int(lengths_B.max())
    tokens_BT = np.zeros((len(rows), max(longest, min(width or padded_width(longest), max_width))), np.int32)
    for row, tokens in zip(tokens_BT, rows, strict=True):
        row[: len(tokens)] = tokens
    return tokens_BT, lengths_B


def padded_width(length: int) -> int:
    """The width for prompts of this length: a multiple of `MIN_WIDTH`, and of an eighth of the next power of two."""
    step = max(MIN_WIDTH, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def _decode(
    results: Iterator[GenerateResult],
    detokenizers: Sequence[StreamingDetokenizer],
    stop_tokens: set[int],
    stats: GenerationStats,
) -> Iterator[list[str]]:
    """Text of each piece of tokens, and at last the characters that never became complete. A stop token, which only the
    last of a row can be, is no text, whatever it is otherwise."""
    started = time.perf_counter()
    for i, piece in enumerate(results):
        lengths = [int(n) for n in piece.lengths]
        if i > 1:
            stats.seconds, stats.timed_tokens = time.perf_counter() - started, stats.timed_tokens + sum(lengths)
        else:  # the first piece comes from the prefill, the second from the decoding loop that was compiled for it
            started = time.perf_counter()
        for row, n in enumerate(lengths):
            stats.loops += piece.loops[row, :n].tolist()
        if isinstance(piece, SpeculativeResult):
            stats.drafted, stats.accepted = int(piece.drafted.sum()), int(piece.accepted.sum())
        tokens = [[t for t in piece.tokens[row, :n].tolist() if t not in stop_tokens] for row, n in enumerate(lengths)]
        yield [detokenizer.add(new) for detokenizer, new in zip(detokenizers, tokens, strict=True)]
    yield [detokenizer.add([], last=True) for detokenizer in detokenizers]


def _on_mesh(loaded: LoadedModel, results: Iterator[GenerateResult]) -> Iterator[GenerateResult]:
    """Computes each piece on the mesh, which is not the caller's current mesh between pieces."""
    while True:
        with use_mesh(loaded.mesh):
            piece = next(results, None)
        if piece is None:
            return
        yield piece


def text_logits(
    loaded: LoadedModel,
    text_or_tokens: str | Sequence[int] | np.ndarray | jax.Array,
    *,
    loops: int | None = None,
    halting: Halting | str | None = None,
    initial_state: str | None = None,
    seed: int = 0,
    special_tokens: bool = False,
) -> jax.Array:
    """Next-token logits of a text or of tokens, float32 [T, V], or [B, T, V] for tokens [B, T].

    A text starts as in generation; tokens are taken as they are. The last row predicts what comes after them. Other
    keywords as in `stream_texts`.

    Raises ConfigError for tokens that the model cannot take.
    """
    policy = Halting.parse(halting) if isinstance(halting, str) else halting
    if isinstance(text_or_tokens, str):
        tokens = np.array(_encode(loaded, text_or_tokens, special_tokens), np.int32)
    else:
        tokens = np.asarray(text_or_tokens)
    config = loaded.config.model
    _check_tokens(config, tokens, loops)
    check_halting(config, policy, cached=False)
    tokens_BT = jnp.asarray(tokens.reshape(-1, tokens.shape[-1]), jnp.int32)
    # Traced, so that other depths reuse the compiled program.
    depth = jnp.int32(config.loops if loops is None else loops)
    with use_mesh(loaded.mesh):
        logits_BTV = _logits(loaded.model, loaded.variables, tokens_BT, depth, policy, initial_state, jnp.uint32(seed))
    return logits_BTV if tokens.ndim == 2 else logits_BTV[0]


def _check_tokens(config: ModelConfig, tokens: np.ndarray, loops: int | None) -> None:
    if tokens.ndim not in (1, 2) or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ConfigError(f"tokens: got {tokens.dtype} of shape {tokens.shape}, allowed: integers [T] or [B, T]")
    if tokens.shape[-1] > config.max_seq_len:
        raise ConfigError(f"tokens: got {tokens.shape[-1]}, allowed: at most max_seq_len, {config.max_seq_len}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ConfigError(
            f"tokens: got {tokens.min()} to {tokens.max()}, allowed: 0 to {config.vocab_size - 1}, the vocabulary"
        )
    if loops is not None and loops < 1:
        raise ConfigError(f"loops: got {loops}, allowed: an integer >= 1")


@partial(jax.jit, static_argnames=("model", "initial_state"))
def _logits(
    model: Mythos,
    variables: Any,
    tokens_BT: jax.Array,
    loops: jax.Array,
    halting: Halting | None,
    initial_state: str | None,
    seed: jax.Array,
) -> jax.Array:
    B, T = tokens_BT.shape
    # The noise that generation draws, so that these are the logits that it samples from.
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    start = starting_state(model.config, initial_state, jnp.broadcast_to(seed, B), positions_BT)

    def forward(model: Mythos) -> Output:
        return model(tokens_BT, loops=loops, halting=halting, initial_state=start)

    return replicate(apply(forward, model, variables).logits)
