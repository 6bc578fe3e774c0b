"""Conversations as tokens with a weight each: 1 on the model's own words, 0 on all else.

The whole text of a conversation is made by the chat template and tokenized at once, so that its tokens are those that
`mythos chat` and transformers give it. What the model says itself is found in one of three ways, in characters, and its
tokens are those that contain one of these characters:

1. The template marks it with `{% generation %}`.
2. It is what follows the prompt: the text of the messages before an answer, with what the template writes before an
   answer, must be the beginning of the text with the answer, and that the beginning of the whole text. What is only
   white space after the token that ends an answer is no part of it.
3. If the whole text does not begin so, because the template writes earlier messages otherwise than the last one (it
   leaves out their thinking, for example), every answer gets a text of its own, which ends with it, and is trained on
   in that one alone. This is what the model sees when it answers.

A template of which none of these is true is refused for the record, because any mask would be a guess.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mythos_jax.data.chat_record import ANSWER, Completion, Conversation, RecordError
from mythos_jax.data.chat_template import ChatTemplate
from mythos_jax.data.conventions import TextConventions, read_conventions
from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.paths import to_path


def make_chat_encoder(spec: str | Path, tokenizer: Tokenizer, template: str | Path, seq_len: int) -> "ChatEncoder":
    """spec: where the tokenizer is from, as for `load_tokenizer`; what a model's files say is beside it. template: a
    Jinja file; empty: the model's own, if it has one.

    Raises ConfigError for a damaged file, and for a template that is none.
    """
    path = to_path(spec)
    directory = path if path.is_dir() else path.parent
    conventions = read_conventions(spec, tokenizer, directory, tokenizer.vocab_size)
    if template:
        own = ChatTemplate.from_file(template, conventions.special_tokens).source
        conventions = replace(conventions, chat_template=own)
    origin = str(template or f"of {spec}")
    return chat_encoder_of(tokenizer, conventions, seq_len, datetime.now(), origin)


def chat_encoder_of(
    tokenizer: Tokenizer, conventions: TextConventions, seq_len: int, now: datetime, origin: str = "of the model"
) -> "ChatEncoder":
    """now: one time for all conversations, so that it does not change on the way. origin: of the template, for
    messages."""
    source, found = conventions.chat_template, None
    if source is not None:
        found = ChatTemplate(source, origin, conventions.special_tokens, clock=lambda: now)
    return ChatEncoder(tokenizer, conventions, found, seq_len + 1)


class Answer(NamedTuple):
    """The tokens of one answer in a sample, and whether one of them ends it."""

    start: int
    end: int
    ends: bool


@dataclass(frozen=True)
class Sample:
    """What the model sees at once. tokens: int32 [n]. weights: float32 [n], of each token as a target, so that the
    first one has none. text_bytes: of its text, UTF-8. dropped: tokens at its end that a row has no room for."""

    tokens: np.ndarray
    weights: np.ndarray
    text_bytes: int
    all_answers: tuple[Answer, ...] = ()
    dropped: int = 0

    def fit(self, room: int) -> "Sample":
        dropped = max(len(self.tokens) - room, 0)
        return replace(self, tokens=self.tokens[:room], weights=self.weights[:room], dropped=dropped)

    @property
    def answers(self) -> int:
        """Those of which something is trained on."""
        return len(self._trained)

    @property
    def unended(self) -> int:
        """Those of them without the token that ends them."""
        return sum(not answer.ends or answer.end > len(self.tokens) for answer in self._trained)

    @property
    def _trained(self) -> list[Answer]:
        return [answer for answer in self.all_answers if self.weights[answer.start : answer.end].any()]


@dataclass(frozen=True)
class Encoded:
    """The samples of one conversation. cut: whether it is divided at turns, or lacks the oldest, because it is too
    long. by_answer: whether every answer has a text of its own. joined: whether a completion begins inside a token.
    unwritten_tools: whether it has tools that the template does not write."""

    samples: list[Sample]
    cut: bool = False
    by_answer: bool = False
    joined: bool = False
    unwritten_tools: bool = False


@dataclass(frozen=True)
class ChatEncoder:
    """template: None for a tokenizer without one, which can only continue texts. room: tokens of the longest sample.

    While a conversation is encoded, places: of each run of messages that ends with an answer (their identities), where
    that begins and ends in their text, and a hash of the text.
    """

    tokenizer: Tokenizer
    conventions: TextConventions
    template: ChatTemplate | None
    room: int
    places: dict[tuple[int, ...], tuple[int, int, bytes]] = field(default_factory=dict, compare=False, repr=False)
    stopped: threading.Event | None = None

    @property
    def fingerprint(self) -> str:
        """Identifies what the tokens and weights of a conversation depend on, besides the tokenizer and the time."""
        c = self.conventions
        parts = [c.chat_template, dict(c.special_tokens), list(c.first_tokens), list(c.stop_tokens)]
        return hashlib.sha256(json.dumps([*parts, "chats 1"]).encode()).hexdigest()

    @property
    def asks_the_time(self) -> bool:
        return "strftime_now" in (self.conventions.chat_template or "")

    def encode(self, parsed: Conversation | Completion, stopped: threading.Event | None = None) -> Encoded:
        """stopped: when it is set, no longer: CancelledError.

        Raises RecordError: the template refuses the conversation, or shows nowhere where an answer begins.
        """
        try:
            if isinstance(parsed, Completion):
                return self._completion(parsed)
            return replace(self, places={}, stopped=stopped)._conversation(parsed)
        except ConfigError as error:
            raise RecordError(str(error)) from None

    def _completion(self, pair: Completion) -> Encoded:
        text, border = pair.prompt + pair.completion, len(pair.prompt)
        tokens, starts, ends = self.tokenizer.encode_spans(text)
        row = self.conventions.begin(tokens)
        # All before the first token that reaches into the continuation.
        prompt, words = len(row) - int((ends > border).sum()), len(row)
        name = self.conventions.special_tokens.get("eos_token")
        named = None if name is None else self.tokenizer.token_id(name)
        end = self.tokenizer.end_of_document if named is None else named
        if row[-1] != end:
            row.append(end)
        weights = np.ones(len(row), np.float32)
        # An end alone is not learnt: if the first token of all is the whole continuation, nothing is.
        weights[: max(prompt, 1) if words > 1 else len(row)] = 0
        answer = Answer(prompt, len(row), ends=True)
        sample = Sample(np.array(row, np.int32), weights, len(text.encode()), (answer,))
        return Encoded([sample.fit(self.room)], joined=bool(((starts < border) & (ends > border)).any()))

    def _conversation(self, conversation: Conversation) -> Encoded:
        self._check_calls(conversation)
        unwritten = bool(conversation.tools) and self._is_unwritten(conversation, replace(conversation, tools=()))
        whole = self._whole(conversation)
        if whole is None:
            samples, cut, count = [], False, 0
            for i, weight in enumerate(conversation.weights):
                if weight:
                    sample, count, turns = self._newest_turns(conversation, i, count + 1)
                    samples.append(sample)
                    cut = cut or count < turns
            return Encoded(samples, cut, by_answer=True, unwritten_tools=unwritten)
        parts = [whole] if len(whole.tokens) <= self.room else list(self._cut(conversation))
        return Encoded(parts, cut=len(parts) > 1, unwritten_tools=unwritten)

    def _check_calls(self, conversation: Conversation) -> None:
        """Raises RecordError for an answer that consists of calls, where the template writes none."""
        for i, (message, weight) in enumerate(zip(conversation.messages, conversation.weights, strict=True)):
            if weight and "tool_calls" in message:
                upto = conversation.part(slice(i + 1))
                bare = {key: value for key, value in message.items() if key != "tool_calls"}
                if self._is_unwritten(upto, replace(upto, messages=(*upto.messages[:-1], bare))):
                    raise RecordError(
                        f"the chat template does not write the tool_calls of message {i + 1}, so they cannot be "
                        "learnt; allowed: the weight 0, or another template (--chat-template, data.chat_template)"
                    )

    def _is_unwritten(self, conversation: Conversation, without: Conversation) -> bool:
        """Whether the template writes the same for both."""
        count = len(conversation.messages)
        text = self._render(conversation, count)
        try:
            return text == self._render(without, count)
        except ConfigError:  # it misses what is gone
            return False

    def _cut(self, conversation: Conversation) -> Iterator[Sample]:
        """As many turns as fit after the system messages that the conversation starts with, and so on with the rest."""
        head, turns = conversation.turns()
        count = 1
        while turns:
            samples: dict[int, Sample] = {}

            def fits(n: int, turns: list[slice] = turns, samples: dict[int, Sample] = samples) -> bool:
                samples[n] = self._turns(conversation.part(slice(head), *turns[:n]))
                return len(samples[n].tokens) <= self.room

            count = _most(len(turns), fits, first=count)
            if count not in samples:
                fits(count)
            yield samples[count].fit(self.room)
            turns = turns[count:]

    def _turns(self, part: Conversation) -> Sample:
        """A part of a conversation that is too long; nothing if none of it is trained on."""
        if not any(part.weights):
            return Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), text_bytes=0)
        sample = self._whole(part)
        if sample is None:
            raise RecordError("is too long, and the chat template writes its parts otherwise than the whole")
        return sample

    def _newest_turns(self, conversation: Conversation, i: int, first: int) -> tuple[Sample, int, int]:
        """Message i at the end of its own text, without the oldest turns where that would be too long; the number of
        turns that it has, and of those that there are. first: about how many have room."""
        before = conversation.part(slice(i + 1))
        head, turns = before.turns()
        samples: dict[int, Sample] = {}

        def fits(n: int) -> bool:
            samples[n] = self._last_answer(before.part(slice(head), *turns[len(turns) - n :]))
            return len(samples[n].tokens) <= self.room

        count = _most(len(turns), fits, first)
        if count not in samples:
            fits(count)
        return samples[count].fit(self.room), count, len(turns)

    def _whole(self, conversation: Conversation) -> Sample | None:
        """The conversation in one text; None if the whole text does not begin as that up to one of its answers does."""
        if self._template.marks_answers:
            return self._sample(*self._marked(conversation))
        text = self._render(conversation, len(conversation.messages))
        passages = []
        for i, weight in enumerate(conversation.weights):
            if weight:
                start, end, text_hash = self._place(conversation, i)
                if len(text) < end or _hash(text[:end]) != text_hash:
                    return None
                passages.append((start, end, weight))
        return self._sample(text, passages)

    def _last_answer(self, conversation: Conversation) -> Sample:
        start, text = self._answer(conversation, len(conversation.messages) - 1)
        return self._sample(text, [(start, len(text), conversation.weights[-1])])

    def _place(self, conversation: Conversation, i: int) -> tuple[int, int, bytes]:
        """Where message i begins and ends in the text up to its end, and a hash of that, which may be long."""
        key = tuple(map(id, conversation.messages[: i + 1]))
        if key not in self.places:
            start, upto = self._answer(conversation, i)
            self.places[key] = start, len(upto), _hash(upto)
        return self.places[key]

    def _answer(self, conversation: Conversation, i: int) -> tuple[int, str]:
        """Where message i begins in the text up to its end, and that text."""
        prompt = self._render(conversation, i, prompt=True)
        upto = self._render(conversation, i + 1)
        if not upto.startswith(prompt) or len(prompt) == len(upto):
            tail = one_line(repr(prompt[-40:]))
            raise RecordError(
                f"the chat template ends a prompt with {tail}, but writes message {i + 1} otherwise, so where the "
                "model's own words begin is not known; allowed: a template with {% generation %}, or another "
                "(--chat-template, data.chat_template)"
            )
        return len(prompt), upto

    def _marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int, float]]]:
        text, marked = self._template.render_marked(self._messages(conversation), tools=conversation.tools)
        weights = [
            w for message, w in zip(conversation.messages, conversation.weights, strict=True) if _is_answer(message)
        ]
        if not marked:
            raise RecordError("the chat template marks no words of this conversation with {% generation %}")
        if len(marked) != len(weights):
            if len(set(weights)) > 1:
                raise RecordError(
                    f"the chat template marks {len(marked)} passages of {len(weights)} messages of the role {ANSWER}, "
                    "so which weight each has is not known; allowed: the same weight for all of them"
                )
            weights = weights[:1] * len(marked)
        return text, [(*passage, weight) for passage, weight in zip(marked, weights, strict=True)]

    def _sample(self, text: str, passages: list[tuple[int, int, float]]) -> Sample:
        tokens, starts, ends = self.tokenizer.encode_spans(text)
        weights = np.zeros(len(tokens), np.float32)
        answers: list[Answer] = []
        for start, end, weight in passages:
            inside = np.flatnonzero((starts < end) & (ends > start))
            stops = np.flatnonzero(np.isin(tokens[inside], self._stop_tokens))
            if len(stops) and not self._template.marks_answers:
                rest = tokens[inside[stops[-1] + 1 :]].tolist()
                if not self.tokenizer.spell(rest).strip():
                    inside = inside[: stops[-1] + 1]
            weights[inside] = weight
            if len(inside):
                answers.append(Answer(int(inside[0]), int(inside[-1]) + 1, ends=bool(len(stops))))
        weights[:1] = 0
        return Sample(tokens, weights, len(text.encode()), tuple(answers))

    @property
    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise RecordError(
                "has messages, and the tokenizer has no chat template; allowed: a model's directory, GGUF file or hub "
                "id that has one, or a template (--chat-template, data.chat_template)"
            )
        return self.template

    @cached_property
    def _stop_tokens(self) -> list[int]:
        """What ends an answer: what the model's files say, and what the template writes after one."""
        end, _, _ = self.tokenizer.encode_spans(self._template.answer_end)
        special = [token for token in end.tolist() if not self.tokenizer.visible([token])]
        return [*self.conventions.stop_tokens, *special[:1]]

    def _render(self, conversation: Conversation, count: int, prompt: bool = False) -> str:
        messages = self._messages(conversation, count)
        return self._template.render(messages, prompt=prompt, tools=conversation.tools)

    def _messages(self, conversation: Conversation, count: int | None = None) -> list[dict[str, object]]:
        """The first `count`, with the name that this template has for the model's role."""
        if self.stopped is not None and self.stopped.is_set():
            raise CancelledError
        return [
            {**message, "role": self._template.answer_role} if _is_answer(message) else dict(message)
            for message in conversation.messages[:count]
        ]


def _is_answer(message: object) -> bool:
    return isinstance(message, dict) and message["role"] == ANSWER


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _most(count: int, fits: Callable[[int], bool], first: int) -> int:
    """The largest number up to `count` that fits, at least 1; if one fits, all smaller ones do. Begins at `first`, and
    goes up from there in growing steps, because many take long."""
    low, high, step = 1, max(count, 1), 1
    first = min(max(first, 1), high)
    if first > 1 and not fits(first):
        high = first - 1
    else:
        low = first
        while low < high:
            upto = min(low + step, high)
            if not fits(upto):
                high = upto - 1
                break
            low, step = upto, 2 * step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
