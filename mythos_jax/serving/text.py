"""What the engine answers, as text: of each reply, as its events arrive.

The text of a reply is that of its final tokens up to the first that ends it, or up to where the first of its stop texts
begins. It is handed out as soon as nothing that follows can change it: characters that are not whole are held back, and
so is what may be the beginning of a stop text. The texts of the tokens that are handed out add up to the reply's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.inference.detokenizer import StreamingDetokenizer
from mythos_jax.serving.request import Event, Finished, NewToken, TakenBack


@dataclass
class TextToken:
    """A final token and the text that became certain with it; that may be none, or belong to the tokens before it."""

    event: NewToken
    text: str


@dataclass(frozen=True)
class Draft:
    """A token that is not final, as the text that it would add."""

    index: int
    text: str


@dataclass
class Piece:
    """What some events add to a reply, in this order: drafts from the index `taken_back` on are withdrawn, tokens are
    final and replace the drafts in their places, and drafts follow.

    finished: this is the last piece; drafts that are left come to nothing. stopped: the reply has ended with a stop
    text or a stop token, and the engine has not said that it knows.
    """

    taken_back: int | None = None
    tokens: list[TextToken] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    finished: Finished | None = None
    stopped: bool = False

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    def __bool__(self) -> bool:
        return bool(self.tokens or self.drafts or self.finished) or self.taken_back is not None


class StopTexts:
    """Finds the first stop text: the one that is complete first; of those that end at the same character, the longest.

    This does not depend on how a text is cut into pieces.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = tuple(text for text in texts if text)
        self._longest = max(map(len, self._texts), default=0)

    def find(self, text: str, start: int) -> int | None:
        """Where the first stop text begins in a text of which everything before `start` has been looked at."""
        start = max(0, start - self._longest + 1)
        ends = [(at + len(stop), at) for stop in self._texts if (at := text.find(stop, start)) >= 0]
        return min(ends)[1] if ends else None

    def held(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop text."""
        return max((_overlap(text, stop) for stop in self._texts), default=0)


class ReplyText:
    """Turns the events of one request into pieces of its text.

    tokenizer: None for a model without one, whose tokens have no text. prompt: its tokens. stop_tokens: ids that end
    the reply and are no part of it. stop_texts: the same as text, which a model without tokenizer cannot have.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop_tokens: Sequence[int] = (),
        stop_texts: Sequence[str] = (),
    ):
        self._detokenizer = None if tokenizer is None else StreamingDetokenizer(tokenizer, prompt)
        self._stop_tokens, self._stops = frozenset(stop_tokens), StopTexts(stop_texts)
        self._held: list[TextToken] = []  # final tokens that are not handed out yet
        self._drafts: list[NewToken] = []
        self._told = 0  # drafts at the start of the list that were handed out
        self._finished = False
        self.new_tokens = self.loops = 0  # of all final tokens, with one that ends the reply
        self.drafted = self.accepted = 0

    def add(self, events: Sequence[Event]) -> Piece:
        """What these add. After the piece that is `finished`, nothing does."""
        piece = Piece()
        for event in events:
            if self._finished:
                break
            if isinstance(event, TakenBack):
                self._withdraw(event.index, piece)
            elif isinstance(event, Finished):
                self._end(piece, event)
            elif event.final:
                self._compare(event, piece)
                self._final(event, piece)
            else:
                self._drafts.append(event)
                self.drafted += 1
        if not self._finished:
            piece.drafts = self._draft_texts()[self._told :]
            self._told = len(self._drafts)
        elif piece.finished:
            piece.stopped = not any(isinstance(event, Finished) for event in events)
        return piece

    def _compare(self, event: NewToken, piece: Piece) -> None:
        """Confirms the draft in the place of a final token, or withdraws it and those after it."""
        if not self._drafts or self._drafts[0].index != event.index:
            return
        if self._drafts[0].token == event.token:
            self.accepted += 1
            del self._drafts[0]
            self._told = max(0, self._told - 1)
        else:
            self._withdraw(event.index, piece)

    def _withdraw(self, index: int, piece: Piece) -> None:
        self._drafts = [draft for draft in self._drafts if draft.index < index]
        if len(self._drafts) < self._told:
            self._told = len(self._drafts)
            piece.taken_back = index if piece.taken_back is None else min(index, piece.taken_back)

    def _final(self, event: NewToken, piece: Piece) -> None:
        self.new_tokens += 1
        self.loops += event.loops
        if event.token in self._stop_tokens:
            self._end(piece, Finished("stop"))
            return
        text = "" if self._detokenizer is None else self._detokenizer.add([event.token])
        self._held.append(TextToken(event, text))
        if not self._cut(len(text), piece):
            self._release(piece)

    def _cut(self, new: int, piece: Piece) -> bool:
        """Ends the reply if a stop text is complete; new: characters that have not been looked at."""
        text = "".join(token.text for token in self._held)
        at = self._stops.find(text, len(text) - new) if new else None
        if at is None:
            return False
        kept, length = [], 0
        for token in self._held:
            if length >= at:
                break
            kept.append(TextToken(token.event, token.text[: at - length]))
            length += len(token.text)
        piece.tokens += kept
        piece.finished, self._finished, self._held = Finished("stop"), True, []
        return True

    def _release(self, piece: Piece) -> None:
        """Hands out the tokens before what may still become a stop text, or another text."""
        held = self._stops.held("".join(token.text for token in self._held))
        # What is left of a character at the end of a reply is the last token's.
        kept = int(self._detokenizer is not None and self._detokenizer.unfinished)
        while sum(len(token.text) for token in self._held[len(self._held) - kept :]) < held:
            kept += 1
        released = len(self._held) - kept
        piece.tokens += self._held[:released]
        del self._held[:released]

    def _end(self, piece: Piece, finished: Finished) -> None:
        """Hands out all that is left."""
        rest = "" if self._detokenizer is None else self._detokenizer.add([], last=True)
        if rest and self._held:
            self._held[-1].text += rest
            if self._cut(len(rest), piece):
                return
        piece.tokens += self._held
        piece.finished, self._finished, self._held = finished, True, []

    def _draft_texts(self) -> list[Draft]:
        if self._detokenizer is None:
            return [Draft(draft.index, "") for draft in self._drafts]
        fork = self._detokenizer.fork()
        visible = (
            (draft.index, [draft.token] if draft.token not in self._stop_tokens else []) for draft in self._drafts
        )
        return [Draft(index, fork.add(token)) for index, token in visible]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that is a beginning of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
