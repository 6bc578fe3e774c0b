"""/v1/chat/completions: the answer to a conversation."""

from typing import Any

from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.inference.chat import MOST_ANSWER_TOKENS
from mythos_jax.server.errors import ApiError
from mythos_jax.server.options import Asked
from mythos_jax.server.schemas import ChatRequest
from mythos_jax.server.service import Service
from mythos_jax.server.shapes import finite, token_bytes
from mythos_jax.serving.text import TextToken


async def read(service: Service, body: ChatRequest) -> tuple[Asked, list[list[int]]]:
    """What is asked for, and the tokens of the conversation. Raises ApiError."""
    chat = service.model.require_chat()
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    most = body.max_completion_tokens or body.max_tokens
    wanted = Asked(body, "messages", chat.stop_tokens, most, MOST_ANSWER_TOKENS, logprobs)
    try:
        tokens = await service.aside(chat.tokens, [message.plain for message in body.messages])
    except ConfigError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    if not tokens:
        raise ApiError(400, "messages: the chat template makes an empty text of them", "messages")
    return wanted, [tokens]


class ChatShape:
    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, tokenizer: Tokenizer | None, tokens: list[TextToken], offset: int) -> dict[str, Any]:
        content = [
            {
                **_entry(tokenizer, token.event.token, token.event.logprob or 0.0),
                "top_logprobs": [_entry(tokenizer, number, p) for number, p in token.event.alternatives],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer | None, number: int, logprob: float) -> dict[str, Any]:
    spelling = token_bytes(tokenizer, number)
    return {"token": spelling.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(spelling)}
