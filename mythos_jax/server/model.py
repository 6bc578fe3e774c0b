"""What the server knows about the model that it serves: its names, its text, and what a request may ask of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_jax.data.conventions import TextConventions
from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.inference.chat import Chat
from mythos_jax.model.halting import CRITERIA, Halting, check_halting
from mythos_jax.model.predictor import PREDICTOR, check_predictor
from mythos_jax.runs.load import LoadedModel
from mythos_jax.server.errors import ApiError


@dataclass(frozen=True)
class Defaults:
    """Of requests that do not say. max_new_tokens: None: as many as fit, at most 128, in a chat 512."""

    max_new_tokens: int | None = None
    loops: int | None = None
    halting: Halting | None = None


@dataclass(frozen=True)
class ServedModel:
    """names: what clients may call it; replies have the first. created: seconds since 1970.

    tokenizer, conventions: None for a model without text. chat: None without a chat template. criteria: of halting,
    those that it can follow. loops: of requests that do not say: its own depth, if the engine was built for that.
    max_loops, max_length: the most that the engine was built for.
    """

    names: Sequence[str]
    tokenizer: Tokenizer | None
    conventions: TextConventions | None
    chat: Chat | None
    loops: int
    max_loops: int
    max_length: int
    vocab_size: int
    criteria: Sequence[str] = ()
    predictor: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def require_name(self, name: str) -> None:
        if name not in self.names:
            allowed = ", ".join(self.names)
            raise ApiError(404, f"model: got {name[:200]!r}, allowed: {allowed}", "model", "model_not_found")

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, after those that a text starts with. Raises ApiError without a tokenizer."""
        if self.tokenizer is None or self.conventions is None:
            raise ApiError(
                400, "prompt: got text, allowed: lists of tokens, because the model has no tokenizer", "prompt"
            )
        return self.conventions.begin(self.tokenizer.encode(text).tolist())

    def require_chat(self) -> Chat:
        if self.chat is None:
            message = "the model has no chat template; allowed: /v1/completions, or a server with --chat-template FILE"
            raise ApiError(400, f"messages: {message}", "messages", "no_chat_template")
        return self.chat

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return () if self.conventions is None else self.conventions.stop_tokens

    def card(self, name: str, defaults: Defaults) -> dict[str, Any]:
        """What /v1/models says of it. defaults: of requests that do not say."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "mythos_jax",
            "mythos": {
                "loops": self.loops,
                "max_loops": self.max_loops,
                "max_length": self.max_length,
                "halting": list(self.criteria),
                "chat": self.chat is not None,
                "predictor": self.predictor,
                "defaults": {
                    "loops": defaults.loops or self.loops,
                    "halting": None if defaults.halting is None else defaults.halting.text,
                },
            },
        }


def served_model(
    loaded: LoadedModel,
    names: Sequence[str],
    chat_template: str | Path | None = None,
    max_loops: int | None = None,
    max_length: int | None = None,
) -> ServedModel:
    """Raises ConfigError for a template that is none, or for a model without text."""
    config = loaded.config.model
    tokenizer = loaded.tokenizer if loaded.config.data.uses_tokenizer else None
    conventions = None if tokenizer is None else loaded.conventions
    has_chat = chat_template is not None or (conventions is not None and conventions.chat_template is not None)
    return ServedModel(
        names=names,
        tokenizer=tokenizer,
        conventions=conventions,
        chat=Chat(loaded, chat_template) if has_chat else None,
        loops=min(config.loops, max_loops or config.loops),
        max_loops=max_loops or config.loops,
        max_length=max_length or config.max_seq_len,
        vocab_size=config.vocab_size,
        criteria=[name for name in CRITERIA if _can_follow(loaded, Halting(name))],
        predictor=PREDICTOR in loaded.variables,
    )


def _can_follow(loaded: LoadedModel, halting: Halting) -> bool:
    try:
        check_halting(loaded.config.model, halting, cached=True)
        check_predictor(halting, loaded.variables)
    except (ConfigError, ValueError):
        return False
    return True
