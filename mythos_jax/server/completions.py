"""/v1/completions: what continues a text."""

from typing import Any

from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.inference.text import MOST_TOKENS
from mythos_jax.server.errors import ApiError
from mythos_jax.server.options import Asked, refused
from mythos_jax.server.schemas import CompletionRequest
from mythos_jax.server.service import Service
from mythos_jax.server.shapes import finite, token_bytes
from mythos_jax.serving.text import TextToken


async def read(service: Service, body: CompletionRequest) -> tuple[Asked, list[list[int]]]:
    """What is asked for, and the tokens of every prompt. Raises ApiError."""
    model = service.model
    if body.stops and model.tokenizer is None:
        raise ApiError(400, "stop: got texts, allowed: none, because the model has no tokenizer", "stop")
    wanted = Asked(body, "prompt", model.stop_tokens, body.max_tokens, MOST_TOKENS, body.logprobs)
    prompts: list[list[int]] = []
    for prompt in _each(body.prompt):
        if isinstance(prompt, str):
            try:
                prompt = await service.aside(model.encode, prompt)
            except ConfigError as error:
                raise refused(error) from None
        elif max(prompt) >= model.vocab_size:
            raise ApiError(400, f"prompt: got token {max(prompt)}, allowed: 0 to {model.vocab_size - 1}", "prompt")
        prompts.append(prompt)
    return wanted, prompts


def _each(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Any]:
    """The prompts of a request, each a text or tokens."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


class CompletionShape:
    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def opening(self) -> None:
        return None

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    message = delta

    def logprobs(self, tokenizer: Tokenizer | None, tokens: list[TextToken], offset: int) -> dict[str, Any]:
        likely = [_likely(tokenizer, token) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [_name(tokenizer, token.event.token) for token in tokens],
            "token_logprobs": [finite(token.event.logprob or 0.0) for token in tokens],
            # Null as a whole if none were asked for, as OpenAI's type has it.
            "top_logprobs": likely if any(likely) else None,
            "text_offset": offsets,
        }


def _likely(tokenizer: Tokenizer | None, token: TextToken) -> dict[str, float]:
    """The most likely tokens, and the one that was chosen; empty if none were asked for."""
    event = token.event
    if not event.alternatives:
        return {}
    likely = {_name(tokenizer, number): finite(p) for number, p in event.alternatives}
    return {**likely, _name(tokenizer, event.token): finite(event.logprob or 0.0)}


def _name(tokenizer: Tokenizer | None, number: int) -> str:
    """A token as a name that no other token has: parts of a character as their bytes, as OpenAI writes them."""
    spelling = token_bytes(tokenizer, number)
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
