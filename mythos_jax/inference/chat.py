"""Answers in a conversation: messages rendered by the model's chat template, and what follows, as it is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import jax.numpy as jnp

from mythos_jax.data.chat_template import ChatTemplate, Message
from mythos_jax.errors import ConfigError
from mythos_jax.inference.request import prepare
from mythos_jax.inference.speculative import check_drafts
from mythos_jax.inference.text import RowOptions, TextStream, stream_rows, text_tokenizer
from mythos_jax.model.cache import Cache
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import use_mesh

MOST_ANSWER_TOKENS = 512  # if a request does not say how many
CHUNK = 64  # tokens of a conversation that are read by one call, in all conversations, so that one program does it
MIN_WIDTH = 256  # of a conversation; those of twice, four, … times as many tokens need programs of their own


class Chat:
    """A model that answers. From one answer to the next it keeps the cache, so that only what is new is read.

    template: a Jinja file (default: the model's own chat template).
    Raises ConfigError for a model without a tokenizer or without a template, and for a template that is none.
    """

    def __init__(self, loaded: LoadedModel, template: str | Path | None = None):
        self._loaded = loaded
        self._tokenizer = text_tokenizer(loaded)
        self.template = _template(loaded, template)
        end = self._tokenizer.encode(self.template.answer_end, special_tokens=True).tolist()
        special = [token for token in end if not self._tokenizer.visible([token])]
        # After an answer, templates write what ends it, and some of them more.
        self.stop_tokens = tuple(sorted({*loaded.conventions.stop_tokens, *special[:1]}))
        self._kept: _Kept | None = None

    def stream(self, messages: Sequence[Message], **options: Unpack[RowOptions]) -> TextStream[str]:
        """The answer to a conversation, in pieces, up to a token that ends it; that one is no part of the text.

        It ends the answer before it, whose cache it takes over.

        messages: mappings with `role` and `content`, the last of them the question. Keywords: as in
        `inference.text.stream_texts`; max_new_tokens: default: as many as fit, at most 512.

        Raises ConfigError, at once, for a conversation that the template refuses or the model has no room for.
        """
        tokens, limit = self.tokens(messages), self._loaded.config.model.max_seq_len
        if not 0 < len(tokens) < limit:
            raise ConfigError(f"conversation: got {len(tokens)} tokens, allowed: 1 to {limit - 1}, below max_seq_len")
        width = min(max(MIN_WIDTH, 1 << (len(tokens) - 1).bit_length()), limit)
        chosen: RowOptions = {"prefill_chunk": CHUNK, **options}
        names = ("loops", "halting", "max_new_tokens", "seed", "initial_state", "loop_cache")
        request = (width, *(str(options.get(name)) for name in names))
        kept, self._kept = self._kept, _Kept(request, tokens)
        pieces = stream_rows(
            self._loaded,
            [tokens],
            stop_tokens=self.stop_tokens,
            width=width,
            most_tokens=MOST_ANSWER_TOKENS,
            cache=None if kept is None else kept.for_request(request, tokens),
            keep=self._kept.keep,
            **chosen,
        )
        return TextStream((piece for (piece,) in pieces), pieces.stats)

    def check(self, options: RowOptions) -> None:
        """Raises ConfigError for keywords of `stream` that the model cannot follow."""
        asked: Any = {name: value for name, value in options.items() if not name.startswith("draft_")}
        try:
            with use_mesh(self._loaded.mesh):
                prepare(self._loaded.model, self._loaded.variables, [[0]], None, **{**asked, "max_new_tokens": 1})
            if (loops := options.get("draft_loops")) is not None:
                check_drafts(self._loaded.config.model, loops, options.get("draft_tokens", 3), asked)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Those of a conversation, up to where its answer begins. The template writes all that belongs there."""
        return self._tokenizer.encode(self.template.render(messages), special_tokens=True).tolist()

    def fitting(self, messages: Sequence[Message], new_tokens: int | None) -> list[Message]:
        """The messages that leave room for an answer: without the oldest turns, if need be.

        A turn is a question and all that follows it up to the next; system messages at the start stay, and so does the
        last turn, even if it does not fit.
        new_tokens: of the answer (default: 512, or a quarter of the context if that is less).
        """
        limit = self._loaded.config.model.max_seq_len
        room = min(MOST_ANSWER_TOKENS, limit // 4) if new_tokens is None else new_tokens
        first = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
        turns = [i for i, message in enumerate(messages) if i > first and message["role"] == "user"]
        for start in [first, *turns]:
            kept = [*messages[:first], *messages[start:]]
            if len(self.tokens(kept)) + room <= limit:
                break
        return kept


@dataclass
class _Kept:
    """The cache that an answer has left, and the tokens before it, which are its first.

    The answer itself is read again, as a part of the next prompt: halting may treat a prompt differently, and so an
    answer never depends on what was kept.
    """

    request: Any  # what the cache depends on, besides the tokens
    tokens: list[int]
    cache: Cache | None = None

    def keep(self, cache: Cache) -> None:
        self.cache = cache

    def for_request(self, request: Any, tokens: list[int]) -> Cache | None:
        """The cache with the tokens that this request begins with; None if it is of no use."""
        pairs = enumerate(zip(self.tokens, tokens, strict=False))
        same = next((i for i, (old, new) in pairs if old != new), min(len(self.tokens), len(tokens)))
        held = min(same, len(tokens) - 1)  # the last token is read for what follows it
        if self.cache is None or self.request != request or not held or self.cache.length_B.is_deleted():
            return None
        return self.cache.replace(length_B=jnp.full_like(self.cache.length_B, held))


def _template(loaded: LoadedModel, file: str | Path | None) -> ChatTemplate:
    conventions = loaded.conventions
    if file is not None:
        return ChatTemplate.from_file(file, conventions.special_tokens)
    if conventions.chat_template is None:
        allowed = "a model whose tokenizer_config.json, chat_template.jinja or GGUF has one, or --chat-template FILE"
        raise ConfigError(f"{loaded.directory}: has no chat template; allowed: {allowed}")
    return ChatTemplate(conventions.chat_template, f"of {loaded.directory}", conventions.special_tokens)


def as_messages(question: str | Sequence[Message], system: str | None = None) -> list[Message]:
    """A question, or messages, after a system message if one is given. Raises ConfigError for what is no message."""
    messages: list[Message] = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise ConfigError(f"message: got {message!r}, allowed: a dict with role and content")
    return messages if system is None else [{"role": "system", "content": system}, *messages]
