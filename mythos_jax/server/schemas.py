"""What clients may ask for: OpenAI's fields, of which those that cannot be followed are allowed only as they are by
default, and ours."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic_core.core_schema import CoreSchema, custom_error_schema, no_info_after_validator_function

from mythos_jax.server.errors import FieldError
from mythos_jax.serving.request import MAX_ALTERNATIVES

MOST_STOPS, LONGEST_STOP = 16, 256
MOST_PROMPTS = 128
MOST_DRAFT_TOKENS = 16
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class _Only:
    """Marks a field that may have only values that change nothing."""

    allowed: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.allowed)}

    def _check(self, value: Any) -> Any:
        if not any(type(value) is type(word) and value == word for word in self.allowed):
            raise ValueError(" or ".join(map(json.dumps, self.allowed)))
        return value


@dataclass(frozen=True)
class _Said:
    """Says in one text what a field of several types may be, in place of pydantic's errors for each of them."""

    allowed: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return custom_error_schema(handler(source), "not_allowed", custom_error_message=self.allowed)


def _only(*allowed: Any) -> _Only:
    return _Only(allowed)


Number = Annotated[float, Field(ge=0, le=100)]
Positive = Annotated[int, Field(ge=1, le=_INT32)]
# Of the items of a list that are wrong, the first is enough.
_ITEMS = Field(min_length=1, fail_fast=True)
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
_STOPS = f"a text of 1 to {LONGEST_STOP} characters, or a list of at most {MOST_STOPS} such texts"
Stop = Annotated[StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)], _Said(_STOPS)]
Zero = Annotated[Any, _only(None, 0, 0.0)]
Nothing = Annotated[Any, _only(None, [], {})]
Ignored = Annotated[Any, Field(description="has no effect")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _only(None, False)] = None


class Common(Strict):
    """What both kinds of requests have."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    max_tokens: Positive | None = None
    temperature: Number | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_PROMPTS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Of its lower 32 bits; choice i of a request has this seed + i. A random one if it is not given."""
    # Ours.
    top_k: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    """Sample from the k most likely tokens; 0: all."""
    loops: Positive | None = None
    """The most loops per token."""
    halting: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """A policy that lets tokens stop earlier, such as `latent:0.03`; null: none."""
    min_loops: Positive | None = None
    max_loops: Positive | None = None
    provisional: bool | None = None
    """Show drafts of `draft_loops` loops, up to `draft_tokens` ahead, before full depth confirms them."""
    draft_loops: Positive | None = None
    draft_tokens: Annotated[int, Field(ge=1, le=MOST_DRAFT_TOKENS)] | None = None
    # Of OpenAI's, without effect or without support.
    user: Ignored = None
    safety_identifier: Ignored = None
    metadata: Ignored = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Nothing = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Common":
        _require(self.stream or self.stream_options is None, "stream_options", "only with stream true")
        for name in ("draft_loops", "draft_tokens"):
            _require(self.provisional or getattr(self, name) is None, name, "only with provisional true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Common):
    prompt: (
        str
        | Annotated[list[TokenId], _ITEMS]
        | Annotated[list[str], _ITEMS, Field(max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], _ITEMS]], _ITEMS, Field(max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: Annotated[Any, _only(None, False)] = None
    best_of: Annotated[Any, _only(None, 1)] = None
    suffix: Annotated[Any, _only(None, "")] = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=1000, fail_fast=True)]
    name: Annotated[str, Field(max_length=1000)] | None = None
    # What a reply of ours, or of OpenAI's, has beside its content.
    refusal: Nothing = None
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None
    reasoning_content: Ignored = None

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text, **({} if self.name is None else {"name": self.name})}


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Common):
    messages: Annotated[list[Message], _ITEMS, Field(max_length=10_000)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    response_format: ResponseFormat | None = None
    tools: Nothing = None
    tool_choice: Annotated[Any, _only(None, "none", "auto")] = None
    parallel_tool_calls: Ignored = None
    functions: Nothing = None
    function_call: Annotated[Any, _only(None, "none", "auto")] = None
    modalities: Annotated[Any, _only(None, ["text"])] = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Nothing = None
    verbosity: Annotated[Any, _only(None, "medium")] = None
    web_search_options: Nothing = None
    service_tier: Annotated[Any, _only(None, "auto", "default")] = None
    store: Annotated[Any, _only(None, False)] = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @model_validator(mode="after")
    def _chat_fits_together(self) -> "ChatRequest":
        _require(self.logprobs or self.top_logprobs is None, "top_logprobs", "only with logprobs true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        _require(
            len(limits) < 2, "max_completion_tokens", "the same as max_tokens, its earlier name, or one of the two"
        )
        return self


def _require(ok: object, param: str, allowed: str) -> None:
    if not ok:
        raise FieldError(param, allowed)
