"""A request in the engine, as the host sees it."""

import itertools
from dataclasses import dataclass, field

import numpy as np

from mythos_jax.serving.pages import Held
from mythos_jax.serving.places import Terms
from mythos_jax.serving.programs import Report
from mythos_jax.serving.readout import DRAFT, FINAL
from mythos_jax.serving.request import Event, Finished, Listener, NewToken, Request, TakenBack

NOT_FINITE = "the model gave logits that are NaN or infinite"
_numbers = itertools.count(1)


@dataclass(eq=False)
class Ticket:
    """What the engine knows a request by."""

    request: Request
    listener: Listener
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(eq=False)
class Live:
    """A request that has places.

    ring: its places, in their order. held: its pages. terms: as the device knows them. read: tokens of the prompt that
    are in the cache. since: when it was let in. produced: final tokens so far. drafts: tokens by index that were shown
    and are not final; drafted, accepted: how many of them have not been counted yet. over: its last event has been
    told.
    """

    ticket: Ticket
    ring: list[int]
    held: Held
    terms: Terms
    read: int
    since: float
    produced: int = 0
    drafts: dict[int, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    over: bool = False

    @property
    def request(self) -> Request:
        return self.ticket.request

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.request.tokens)

    def take_back(self, index: int) -> list[Event]:
        """Withdraws the drafts that are shown, which begin at this index."""
        shown, self.drafts = self.drafts, {}
        return [TakenBack(index)] if shown else []

    def take(self, report: Report, row: tuple[int, ...], kind: int, numbers: list[int], seconds: float) -> list[Event]:
        """The events of the row at this index of a report. numbers: position, token, loops, ended, finite."""
        position, token, loops, ended, finite = numbers
        index = position - len(self.request.tokens)
        if not finite and kind == FINAL:
            self.over = True
            return [*self.take_back(index), Finished("failed", NOT_FINITE)]
        new = NewToken(index, token, loops, kind == FINAL, *_probabilities(self.request, report, row), seconds)
        if kind == DRAFT:
            self.drafts[index] = token
            self.drafted += 1
            return [new]
        events: list[Event] = []
        if index in self.drafts:
            if self.drafts[index] == token:
                self.accepted += 1
                del self.drafts[index]
            else:
                events += self.take_back(index)
        events.append(new)
        self.produced += 1
        if ended:
            self.over = True
            events += self.take_back(index + 1)
            events.append(Finished("stop" if token in self.request.stop_tokens else "length"))
        return events


def _probabilities(
    request: Request, report: Report, row: tuple[int, ...]
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """The log-probability of the row's token and the alternatives, if they were asked for."""
    if request.logprobs is None:
        return None, ()
    top, of_top = np.asarray(report.top_KA)[row], np.asarray(report.top_logprob_KA)[row]
    alternatives = zip(top[: request.logprobs].tolist(), of_top[: request.logprobs].tolist(), strict=True)
    return float(np.asarray(report.logprob_K)[row]), tuple(alternatives)
