"""Tokens to text as they arrive, with the same result as if they were decoded at once.

The text of a continuation is `decode(prompt + new)` without the prefix that it has in common with `decode(prompt)`:
what a tokenizer does at the start of a text, such as dropping a space, is done to the prompt, and not again to the
continuation.
"""

import copy
from collections.abc import Iterable

from mythos_jax.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what tokenizers write for bytes that are not a character, or not yet
KEPT = 4  # tokens that are decoded again, so that those after them are not at the start of a text
LIMIT, KEPT_UNFINISHED = 32, 8  # the same while the text never ends with a whole character


class StreamingDetokenizer:
    """Turns the tokens that follow a prompt into text as they arrive.

    It holds back what later tokens may change: bytes that are not a whole character yet and, with byte fallback, a run
    of byte tokens, which is text or not as a whole. All pieces together are the text of the continuation.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._window = self._tail(tokenizer.visible(prompt), KEPT)
        self._prompt: str | None = tokenizer.decode(self._window)  # None once something was returned
        self._returned = 0  # characters of the window's text
        self.unfinished = False  # whether the last tokens have bytes that are not text yet

    def add(self, tokens: Iterable[int], last: bool = False) -> str:
        """The text that has become certain with these tokens; with `last`, everything that is left."""
        new = self._tokenizer.visible(tokens)
        self._window += new
        in_run = bool(self._window) and self._window[-1] in self._tokenizer.fallback_bytes
        if not last and (in_run or not new):
            self.unfinished = in_run or self.unfinished
            return ""
        text = self._tokenizer.decode(self._window)
        # A run of bytes that are not text has one replacement for each character that was begun, so only the last
        # of them can still become a character.
        self.unfinished = unfinished = not last and text.endswith(REPLACEMENT)
        end = len(text) - unfinished
        if self._prompt is not None:
            self._returned = _common(self._prompt, text[:end])
        piece = text[self._returned : end]
        if piece:
            self._prompt = None
        self._returned = max(self._returned, end)
        if not unfinished or len(self._window) > LIMIT:
            self._forget(KEPT_UNFINISHED if unfinished else KEPT, unfinished)
        return piece

    def fork(self) -> "StreamingDetokenizer":
        """Another one that continues from here, for tokens that may be withdrawn."""
        other = copy.copy(self)
        other._window = list(self._window)
        return other

    def _forget(self, kept: int, unfinished: bool) -> None:
        """Keeps the end of the window only, all of which was returned but for an unfinished character."""
        self._window = self._tail(self._window, kept)
        text = self._tokenizer.decode(self._window)
        self._returned = len(text) - unfinished
        if self._prompt is not None:
            self._prompt = text

    def _tail(self, tokens: list[int], count: int) -> list[int]:
        """About the last `count` tokens; a run of byte tokens is not cut."""
        fallback = self._tokenizer.fallback_bytes
        start = max(len(tokens) - count, 0)
        while start > 0 and tokens[start] in fallback:
            start -= 1
        return tokens[start:]


def continuation_text(tokenizer: Tokenizer, prompt: Iterable[int], tokens: Iterable[int]) -> str:
    """The text that tokens add to that of a prompt."""
    return StreamingDetokenizer(tokenizer, prompt).add(tokens, last=True)


def _common(first: str, second: str) -> int:
    """How many characters at the start of two texts are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
