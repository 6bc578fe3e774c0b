"""What the engine is asked for, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mythos_jax.model.halting import Halting

MAX_STOP_TOKENS = 8  # that the device looks for, for each request
MAX_ALTERNATIVES = 20  # most likely tokens that a request may ask for beside each new one


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    tokens: the prompt, at least one. max_new_tokens: at least 1. loops: the most per token (default: the model's).
    halting: a policy to stop earlier, its numbers Python's. temperature, top_k, top_p, seed, stop_tokens: as in
    `inference.generate.generate`. logprobs: how many alternatives to report beside each new token, with their
    log-probabilities; None reports none, and not the new token's either.
    draft_loops: show what the model would say after that many loops, before full depth is there, up to `draft_tokens`
    ahead.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    loops: int | None = None
    halting: Halting | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: Sequence[int] = ()
    logprobs: int | None = None
    draft_loops: int | None = None
    draft_tokens: int = 3

    @property
    def capacity(self) -> int:
        """Tokens of the prompt and the answer together."""
        return len(self.tokens) + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that follows the prompt.

    index: among the new ones, from 0. loops: spent on predicting it. final: false for a draft, which a final token with
    the same index will confirm, or a `TakenBack` withdraw. logprob: natural logarithm of its probability at temperature
    1; alternatives: the most likely tokens and theirs (None and empty if the request did not ask). seconds: when the
    host knew it, as `time.perf_counter` counts.
    """

    index: int
    token: int
    loops: int
    final: bool
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class TakenBack:
    """All drafts from this index on are withdrawn."""

    index: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every request. No drafts are left with it.

    reason: "stop", it ended with one of its stop tokens, which was reported; "length", it has all tokens that it asked
    for; "cancelled"; "failed", the message says why.
    """

    reason: Literal["stop", "length", "cancelled", "failed"]
    message: str = ""


Event = NewToken | TakenBack | Finished
Listener = Callable[[Sequence[Event]], None]  # is called in the engine's thread and must return at once


class BusyError(RuntimeError):
    """The queue is full. retry_after: seconds after which there may be room."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after
