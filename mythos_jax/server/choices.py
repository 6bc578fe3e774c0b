"""The replies of one HTTP request: asked of the engine together, read from one inbox, ended together."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mythos_jax.errors import ConfigError
from mythos_jax.server.errors import ApiError, busy
from mythos_jax.server.inbox import Overflow
from mythos_jax.server.options import Asked, engine_request, refused
from mythos_jax.server.service import Service
from mythos_jax.serving.request import BusyError, Event, Finished, NewToken, Request
from mythos_jax.serving.text import Piece, ReplyText


@dataclass
class Choice:
    """One reply. prompt: the number of its prompt among those of the request.

    finish: why it ended, as OpenAI says it; None while it goes on.
    """

    index: int
    prompt: int
    request: Request
    reply: ReplyText
    ticket: Any = None
    finish: str | None = None
    last_seconds: float | None = None
    pieces: list[Piece] = field(default_factory=list)


class Choices:
    """All of a request. A context manager, which cancels what has not ended when it is left.

    accepted: when the request came, as `time.perf_counter` counts.
    """

    def __init__(self, service: Service, wanted: Asked, prompts: Sequence[list[int]], accepted: float):
        """Raises ApiError for what the model or the engine cannot do."""
        self.service, self.wanted, self.prompts, self.accepted = service, wanted, prompts, accepted
        count = wanted.body.n or 1
        if len(prompts) * count > (most := service.limits.choices):
            message = f"n: got {count} for each of {len(prompts)} prompts, allowed: {most} replies of one request"
            raise ApiError(400, message, "n")
        self.choices = [self._choice(i, j, j * count + i) for j in range(len(prompts)) for i in range(count)]
        self._inbox = service.inbox(len(self.choices))

    def _choice(self, number: int, prompt: int, index: int) -> Choice:
        tokens = self.prompts[prompt]
        request = engine_request(self.service, self.wanted, tokens, number)
        reply = ReplyText(self.service.model.tokenizer, tokens, self.wanted.stop_tokens, self.wanted.body.stops)
        return Choice(index, prompt, request, reply)

    def submit(self) -> None:
        """Raises ApiError if the engine does not take all of them; it then has none of them."""
        self.service.inboxes.add(self._inbox)
        try:
            for choice in self.choices:
                choice.ticket = self.service.engine.submit(choice.request, self._inbox.listener(choice.index))
        except BaseException as error:
            self.close()
            if isinstance(error, BusyError):
                raise busy(str(error), error.retry_after) from None
            if isinstance(error, ConfigError):
                raise refused(error) from None
            if isinstance(error, RuntimeError):  # it is closed
                raise ApiError(503, "the server is stopping", code="server_stopping", retry_after=5) from None
            raise

    def close(self) -> None:
        """Cancels what has not ended."""
        self._inbox.close()
        self.service.inboxes.discard(self._inbox)
        for choice in self.choices:
            if choice.ticket is not None and choice.finish is None:
                choice.finish = "cancelled"
                self.service.engine.cancel(choice.ticket)

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece] | None]:
        """What arrives, up to the end of all choices. None stands for some seconds without news.

        Raises ApiError if the engine ends a reply that has not ended.
        """
        running = len(self.choices)
        while running:
            try:
                batches = await self._inbox.take(self.service.limits.keep_alive_seconds)
            except Overflow:
                raise ApiError(408, "the reply is read too slowly", code="slow_reader") from None
            if not batches:
                yield None
            for index, events in _merged(batches):
                if index < 0:
                    raise self._failure(events[-1])
                choice = self.choices[index]
                piece = self._add(choice, events)
                running -= piece.finished is not None
                if piece:
                    yield choice, piece

    def _add(self, choice: Choice, events: Sequence[Event]) -> Piece:
        piece = choice.reply.add(events)
        if piece.finished is not None:
            if piece.finished.reason not in ("stop", "length"):
                raise self._failure(piece.finished)
            choice.finish = piece.finished.reason
            if piece.stopped:
                self.service.engine.cancel(choice.ticket)
        self._measure(choice, events)
        return piece

    def _measure(self, choice: Choice, events: Sequence[Event]) -> None:
        metrics = self.service.metrics
        for event in events:
            if isinstance(event, NewToken) and event.final:
                if choice.last_seconds is None:
                    metrics.first_token.observe(max(0.0, event.seconds - self.accepted))
                else:
                    metrics.between_tokens.observe(max(0.0, event.seconds - choice.last_seconds))
                choice.last_seconds = event.seconds
        if choice.finish is not None:
            metrics.duration.observe(time.perf_counter() - self.accepted)

    def _failure(self, event: Event) -> ApiError:
        if isinstance(event, Finished) and event.reason == "failed":
            return ApiError(500, f"the engine has failed: {event.message or self.service.failed}", code="engine_failed")
        return ApiError(503, "the server is stopping", code="server_stopping", retry_after=5)

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's numbers, and the loops of all new tokens."""
        prompt = sum(map(len, self.prompts))
        new = sum(choice.reply.new_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "loops": sum(choice.reply.loops for choice in self.choices),
        }

    @property
    def summary(self) -> str:
        """For the log: numbers, and nothing that was said."""
        usage = self.usage
        ends = ",".join(dict.fromkeys(choice.finish or "unfinished" for choice in self.choices))
        milliseconds = (time.perf_counter() - self.accepted) * 1000
        return (
            f"{len(self.choices)} choices, {usage['prompt_tokens']} + {usage['completion_tokens']} tokens, "
            f"{usage['loops']} loops, {ends}, {milliseconds:.0f} ms"
        )


def _merged(batches: Sequence[tuple[int, Sequence[Event]]]) -> list[tuple[int, list[Event]]]:
    """The batches of each choice as one, in the order in which they began."""
    merged: dict[int, list[Event]] = {}
    for index, events in batches:
        merged.setdefault(index, []).extend(events)
    return list(merged.items())
