"""Records of conversations: what a line of `chats.jsonl` may be, and what is wrong with one that may not.

Either `messages` as OpenAI has them, with `tools` if there are any, or `prompt` and `completion`, two texts or two
lists of messages, as TRL has them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from mythos_jax.errors import one_line
from mythos_jax.json_text import parse_json

ROLES = ("system", "user", "assistant", "tool")
COLUMNS = ("messages", "prompt", "completion", "tools")
ANSWER = "assistant"


class RecordError(ValueError):
    """A record that is not a conversation. The message is the reason, on one line."""


@dataclass(frozen=True)
class Conversation:
    """messages: as the chat template gets them. weights: of each message's tokens; 0 but for those that are trained on.
    tools: descriptions of those that the model may call."""

    messages: tuple[Mapping[str, Any], ...]
    weights: tuple[float, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def part(self, *pieces: slice) -> "Conversation":
        """Some of its messages, in order."""
        return Conversation(
            tuple(message for piece in pieces for message in self.messages[piece]),
            tuple(weight for piece in pieces for weight in self.weights[piece]),
            self.tools,
        )

    def turns(self) -> tuple[int, list[slice]]:
        """The number of system messages that it starts with, and its turns after them: a user's message and all that
        follows it up to the next one."""
        is_system = [message["role"] == "system" for message in self.messages]
        head = next((i for i, system in enumerate(is_system) if not system), len(is_system))
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user" and i > head]
        starts = [head, *users]
        return head, [slice(a, b) for a, b in zip(starts, [*users, len(self.messages)], strict=True)]


@dataclass(frozen=True)
class Completion:
    """A text to be continued, and its continuation, which is trained on."""

    prompt: str
    completion: str


def parse_record(record: Any) -> Conversation | Completion:
    """What a record of JSON holds. Raises RecordError."""
    if not isinstance(record, dict):
        raise RecordError(f"got {_kind(record)}, allowed: an object with messages, or with prompt and completion")
    found = {name: record[name] for name in COLUMNS if record.get(name) is not None}
    if "messages" in found and ("prompt" in found or "completion" in found):
        raise RecordError("has messages, and prompt or completion too; allowed: one of the two")
    tools = _tools(found.get("tools"))
    if "messages" in found:
        messages, weights = _messages(found["messages"], "messages")
        return _checked(Conversation(messages, weights, tools))
    if not {"prompt", "completion"} <= set(found):
        names = ", ".join(f"{name}"[:60] for name in list(record)[:10])
        raise RecordError(
            f"no messages, and not both prompt and completion; it has {one_line(names) or 'no fields'}; "
            'allowed: {"messages": […]} or {"prompt": …, "completion": …}'
        )
    prompt, completion = found["prompt"], found["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if tools:
            raise RecordError("has tools beside two texts; allowed: only with messages, as a chat template writes them")
        return _completion(prompt, completion)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        got = f"{_kind(prompt)} and {_kind(completion)}"
        raise RecordError(f"prompt and completion: got {got}, allowed: two texts, or two lists of messages")
    before, weights = _messages(prompt, "prompt")
    answer, answer_weights = _messages(completion, "completion")
    return _checked(Conversation((*before, *answer), (*(0.0 for _ in weights), *answer_weights), tools))


def canonical(parsed: Conversation | Completion) -> str:
    """The same text for the same conversation, whatever its record looks like; `from_canonical` reads it."""
    if isinstance(parsed, Completion):
        tree: Any = [parsed.prompt, parsed.completion]
    else:
        tree = {"messages": parsed.messages, "weights": parsed.weights, "tools": parsed.tools}
    return json.dumps(tree, ensure_ascii=False)


def from_canonical(text: str) -> Conversation | Completion:
    tree = json.loads(text)
    if isinstance(tree, list):
        return Completion(*tree)
    return Conversation(*(tuple(tree[name]) for name in ("messages", "weights", "tools")))


def _completion(prompt: str, completion: str) -> Completion:
    if not completion:
        raise RecordError("completion: is empty")
    _check_unicode(prompt + completion)
    return Completion(prompt, completion)


def _checked(conversation: Conversation) -> Conversation:
    if all(message["role"] != ANSWER for message in conversation.messages):
        raise RecordError(f"no message of the role {ANSWER}, so there is nothing to learn")
    if not any(conversation.weights):
        raise RecordError(f"every message of the role {ANSWER} that could be trained on has the weight 0")
    _check_unicode(canonical(conversation))
    return conversation


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError("text is not valid Unicode (half of a surrogate pair)") from None


def _messages(value: Any, name: str) -> tuple[tuple[Mapping[str, Any], ...], tuple[float, ...]]:
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _kind(value)
        raise RecordError(f"{name}: got {got}, allowed: a list of messages, each with role and content")
    pairs = [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]
    return tuple(message for message, _ in pairs), tuple(weight for _, weight in pairs)


def _message(value: Any, name: str) -> tuple[Mapping[str, Any], float]:
    if not isinstance(value, dict):
        raise RecordError(f"{name}: got {_kind(value)}, allowed: an object with role and content")
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role not in ROLES:
        raise RecordError(f"{name}.role: got {_shown(role)}, allowed: {', '.join(ROLES)}")
    calls = _tool_calls(message.pop("tool_calls", None), f"{name}.tool_calls")
    content = _content(message.pop("content", ""), f"{name}.content")
    # A tool may return nothing, and a system message may say nothing.
    if not content.strip() and role in ("user", ANSWER) and not calls:
        raise RecordError(f"{name}.content: is empty, allowed: a text")
    weight = message.pop("weight", float(role == ANSWER))
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise RecordError(f"{name}.weight: got {_shown(weight)}, allowed: a number from 0 to 1")
    if role != ANSWER and weight:
        raise RecordError(
            f"{name}.weight: got {weight}, allowed: 0 for the role {role}, as only answers are trained on"
        )
    rest = {key: _as_json(item, f"{name}.{one_line(key, 60)}") for key, item in message.items() if key != "role"}
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **rest}, float(weight)


def _content(value: Any, name: str) -> str:
    """A text, or a list of parts that are texts."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    found: list[str] = []
    for i, text in enumerate(texts):
        if isinstance(text, str):
            found.append(text)
        else:
            kind = text.get("type", "no type") if isinstance(text, dict) else _kind(text)
            where = f"{name}[{i}]" if isinstance(value, list) else name
            raise RecordError(
                f"{where}: got {one_line(kind, 60)}, allowed: a text, or a list of parts of the type text"
            )
    return "".join(found)


def _tool_calls(value: Any, name: str) -> list[Any]:
    """The calls, with the arguments of each as an object, which is what templates take; OpenAI has them as a text."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise RecordError(f"{name}: got {_kind(value)}, allowed: a list of objects")
    calls = []
    for call in value:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = parse_json(function["arguments"])
            except ValueError:
                arguments = None
            if isinstance(arguments, dict):
                call = {**call, "function": {**function, "arguments": arguments}}
        calls.append({key: item for key, item in call.items() if item is not None})
    return [_as_json(call, f"{name}[{i}]") for i, call in enumerate(calls)]


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Columns of Parquet files have them as a text of JSON."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise RecordError("tools: not JSON, allowed: a list of objects") from None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RecordError(f"tools: got {_kind(value)}, allowed: a list of objects")
    return tuple(_as_json(tool, f"tools[{i}]") for i, tool in enumerate(value))


def _as_json(value: Any, name: str) -> Any:
    """What columns of Parquet files have besides JSON, as texts: times as ISO 8601 has them, and exact numbers."""
    match value:
        case dict():
            return {key: _as_json(item, f"{name}.{one_line(key, 60)}") for key, item in value.items()}
        case list() | tuple():
            return [_as_json(item, f"{name}[{i}]") for i, item in enumerate(value)]
        case date() | time():
            return value.isoformat()
        case Decimal() | timedelta() | UUID():
            return str(value)
        case None | str() | int() | float():
            return value
    raise RecordError(f"{name}: got {_kind(value)}, allowed: what JSON can hold")


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        **{str: "a text", list: "a list", dict: "an object", bool: "a truth value", type(None): "null"},
        **{int: "a number", float: "a number"},
    }
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return one_line(repr(value), 60)
