"""What replies look like: the parts that completions and chats share."""

import time
from typing import Any, Protocol

from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.server.choices import Choice, Choices
from mythos_jax.serving.text import Piece, TextToken


class Shape(Protocol):
    """How one kind of endpoint writes replies."""

    prefix: str  # of ids
    whole: str  # what a reply calls itself
    part: str  # what a chunk of a stream calls itself

    def opening(self) -> dict[str, Any] | None:
        """What a stream begins with, for each choice; None: nothing."""
        ...

    def delta(self, text: str) -> dict[str, Any]:
        """A piece of text in a chunk."""
        ...

    def message(self, text: str) -> dict[str, Any]:
        """The text of a choice."""
        ...

    def logprobs(self, tokenizer: Tokenizer | None, tokens: list[TextToken], offset: int) -> dict[str, Any]:
        """offset: characters of the reply before these tokens."""
        ...


class Writer:
    """Writes the replies of one request."""

    def __init__(self, shape: Shape, choices: Choices, number: str):
        """number: of the request, a part of the reply's id."""
        self._shape, self._choices, self._id = shape, choices, f"{shape.prefix}-{number}"
        self._created, self._model = int(time.time()), choices.service.model
        self._offsets = [0] * len(choices.choices)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.names[0]}

    def reply(self) -> dict[str, Any]:
        """All choices, which have ended."""
        written = [self._whole(choice) for choice in self._choices.choices]
        return {**self._head(self._shape.whole), "choices": written, "usage": self._choices.usage}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        tokens = [token for piece in choice.pieces for token in piece.tokens]
        fields = {
            "index": choice.index,
            **self._shape.message("".join(token.text for token in tokens)),
            "logprobs": self._logprobs(choice, tokens),
            "finish_reason": choice.finish,
        }
        told = {"tokens": [self._token(choice, token) for token in tokens], **self._summary(choice)}
        return {**fields, "mythos": told}

    def chunk(self, choice: Choice, piece: Piece | None, fields: dict[str, Any], **told: Any) -> dict[str, Any]:
        """A part of a stream."""
        tokens = [] if piece is None else piece.tokens
        written = {
            "index": choice.index,
            **fields,
            "logprobs": self._logprobs(choice, tokens) if tokens else None,
            "finish_reason": None,
        }
        return self._in_chunk(written | ({"mythos": told} if told else {}))

    def _in_chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        empty = {"usage": None} if self._wants_usage else {}
        return {**self._head(self._shape.part), "choices": list(choices), **empty}

    @property
    def _wants_usage(self) -> bool:
        options = self._choices.wanted.body.stream_options
        return options is not None and bool(options.include_usage)

    def opening(self) -> list[dict[str, Any]]:
        fields = self._shape.opening()
        return [] if fields is None else [self.chunk(choice, None, fields) for choice in self._choices.choices]

    def piece(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a piece: its text, if there is news, and the end of the choice."""
        chunks = []
        if piece.tokens or piece.drafts or piece.taken_back is not None:
            told: dict[str, Any] = {"tokens": [self._token(choice, token) for token in piece.tokens]}
            if piece.drafts:
                told["provisional"] = [{"index": draft.index, "text": draft.text} for draft in piece.drafts]
            if piece.taken_back is not None:
                told["taken_back"] = piece.taken_back
            chunks.append(self.chunk(choice, piece, self._shape.delta(piece.text), **told))
        if choice.finish is not None:
            last = self.chunk(choice, None, self._shape.delta(""), **self._summary(choice))
            last["choices"][0]["finish_reason"] = choice.finish
            chunks.append(last)
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        return [{**self._in_chunk(), "usage": self._choices.usage}] if self._wants_usage else []

    def _logprobs(self, choice: Choice, tokens: list[TextToken]) -> dict[str, Any] | None:
        if choice.request.logprobs is None:
            return None
        offset = self._offsets[choice.index]
        self._offsets[choice.index] += sum(len(token.text) for token in tokens)
        return self._shape.logprobs(self._model.tokenizer, tokens, offset)

    def _token(self, choice: Choice, token: TextToken) -> dict[str, Any]:
        event = token.event
        written: dict[str, Any] = {
            "index": event.index,
            "text": token.text,
            "token": event.token,
            "loops": event.loops,
            "ms": round((event.seconds - self._choices.accepted) * 1000, 1),
        }
        if event.logprob is not None:
            written["logprob"] = finite(event.logprob)
            tokenizer = self._model.tokenizer
            written["top"] = [[spelled(tokenizer, number), finite(p)] for number, p in event.alternatives]
        return written

    def _summary(self, choice: Choice) -> dict[str, Any]:
        reply = choice.reply
        return {
            "loops_mean": round(reply.loops / reply.new_tokens, 4) if reply.new_tokens else None,
            "full_loops": choice.request.loops,
            "drafted": reply.drafted,
            "accepted": reply.accepted,
            "seed": choice.request.seed,
        }


def token_bytes(tokenizer: Tokenizer | None, number: int) -> bytes:
    return b"" if tokenizer is None else tokenizer.token_bytes(number)


def spelled(tokenizer: Tokenizer | None, number: int) -> str:
    """A token as text; parts of a character are replaced."""
    return token_bytes(tokenizer, number).decode("utf-8", "replace")


def finite(logprob: float) -> float:
    """A logarithm that JSON can write, also of a probability that is 0 or no number."""
    return logprob if logprob > -9999.0 else -9999.0
