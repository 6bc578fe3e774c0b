"""Text in, text out, whole or as it is decoded."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.flops import cache_bytes
from mythos_jax.inference.generate import stream
from mythos_jax.inference.speculative import SpeculativeResult, stream_drafts
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import use_mesh

# What tokenizers write for bytes that are no whole character, and how many of them may still become one: a UTF-8
# character has up to four bytes.
REPLACEMENT, UNFINISHED = "\ufffd", 3


class StreamingDetokenizer:
    """Text of tokens that come bit by bit: a character whose last bytes are still to come is held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._told = 0  # characters

    def add(self, tokens: list[int], last: bool = False) -> str:
        """The text that is certain now and was not before; with `last`, all that is left."""
        self._tokens += tokens
        # Of all tokens each time: what a token is written as may depend on those before it.
        text = self._tokenizer.decode(self._tokens)
        end = len(text)
        while not last and text[:end].endswith(REPLACEMENT) and len(text) - end < UNFINISHED:
            end -= 1
        new, self._told = text[self._told : end], max(self._told, end)
        return new


@dataclass
class GenerationStats:
    """What a text took. tokens, seconds: from the third piece on, when all programs are compiled."""

    cache_bytes_per_token: int
    loops: list[int] = field(default_factory=list)  # of each token
    tokens: int = 0
    seconds: float = 0.0
    drafted: int = 0  # tokens, and of those the ones that full depth confirmed
    accepted: int = 0

    def __str__(self) -> str:
        mean = f"{np.mean(self.loops):.2f} loops per token, " if self.loops else ""
        speed = f"{self.tokens / self.seconds:.1f} tokens/s, " if self.tokens else ""
        drafts = f"{self.accepted / self.drafted:.0%} of drafts accepted, " if self.drafted else ""
        return f"{len(self.loops)} tokens, {mean}{drafts}{speed}{self.cache_bytes_per_token:,} bytes of cache per token"


def stream_text(
    loaded: LoadedModel,
    prompt: str,
    tokenizer: str | None = None,
    *,
    loops: int | None = None,
    loop_cache_slots: int | None = None,
    **keywords: Any,
) -> tuple[Iterator[str], GenerationStats]:
    """What the model continues the prompt with, up to its end-of-document token, in pieces as they are decoded; and
    what it takes, counted while the pieces are asked for. Other keywords as in `generate`, or, with
    `draft_loops`, as in `speculate`.

    tokenizer: for a model that has none, as for `load_tokenizer`. The prompt follows an end-of-document token, as
    every document does in training. Raises ConfigError, at once, for a prompt or a number that the model cannot take.
    """
    if task := loaded.config.data.task.name:
        raise ConfigError(f"{loaded.directory}: was trained on task {task}, which is no text; allowed: `mythos eval`")
    reader = loaded.tokenizer(tokenizer)
    end = reader.end_of_document
    tokens = jnp.asarray([[end, *reader.encode(prompt)]], jnp.int32)
    keywords |= {"stop_tokens": (end,), "loops": loops, "loop_cache_slots": loop_cache_slots}
    try:
        with use_mesh(loaded.mesh):
            decode = stream_drafts if "draft_loops" in keywords else stream
            pieces = decode(loaded.model, loaded.variables, tokens, **keywords)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    depth = loops or loaded.config.model.loops
    spent = GenerationStats(cache_bytes(loaded.config.model, min(loop_cache_slots or depth, depth)))

    def texts() -> Iterator[str]:
        spelling, started = StreamingDetokenizer(reader), 0.0
        for i, piece in enumerate(_on_mesh(loaded, pieces)):
            n = int(piece.lengths[0])
            if i > 1:
                spent.seconds, spent.tokens = time.perf_counter() - started, spent.tokens + n
            else:  # the first piece comes from the prefill, the second of the decoding that was compiled for it
                started = time.perf_counter()
            spent.loops += piece.loops[0, :n].tolist()
            if isinstance(piece, SpeculativeResult):
                spent.drafted, spent.accepted = int(piece.drafted[0]), int(piece.accepted[0])
            yield spelling.add(piece.tokens[0, :n].tolist())
        yield spelling.add([], last=True)

    return texts(), spent


def _on_mesh(loaded: LoadedModel, pieces: Iterator[Any]) -> Iterator[Any]:
    """Each piece is made on the mesh; the caller, between pieces, is not."""
    while True:
        with use_mesh(loaded.mesh):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def generate_text(loaded: LoadedModel, prompt: str, tokenizer: str | None = None, **keywords: Any) -> str:
    """All that `stream_text` yields, as one text."""
    texts, _ = stream_text(loaded, prompt, tokenizer, **keywords)
    return "".join(texts)
