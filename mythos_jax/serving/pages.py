"""Who owns which page of the paged cache, and which prompts' pages may be used again.

A request gets all pages that it can ever need when it begins, so it never runs out. Full pages of its prompt that have
been read are published: requests whose prompts begin with the same tokens share them, and read less. Published pages
that no request owns stay as they are until room is needed; then the one that was released longest ago goes first.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class _Shared:
    """A published page. place: the published page before it, the key, and the tokens in it."""

    page: int
    place: "_Place"
    owners: int


_Place = tuple[_Shared | None, Hashable, tuple[int, ...]]


@dataclass(eq=False, slots=True)
class Held:
    """The pages of a request, in the order of its tokens. cached_tokens: how many of its first ones are there."""

    pages: list[int]
    cached_tokens: int
    _tokens: tuple[int, ...]
    _key: Hashable
    _shared: list[_Shared]  # the published pages with the request's first tokens, of which it is an owner
    _released: bool = False


class Pages:
    """Gives pages 0 to count - 1, of `page_size` tokens each, to requests. For one thread.

    granularity: requests go on after a multiple of it (and of page_size) in tokens that are there already.
    cached_tokens counts the tokens of prompts that did not have to be read, over all requests.

    Every published page has an owner if one that follows it does, and is released after it. So the first of the unowned
    ones, in the order of their release, is never followed by another.
    """

    def __init__(self, count: int, page_size: int, granularity: int = 1):
        if count < 1 or page_size < 1 or granularity < 1:
            raise ValueError(f"{count} pages of {page_size} tokens, granularity {granularity}: each must be at least 1")
        self.count = count
        self.page_size = page_size
        self.cached_tokens = 0
        self._stride = math.lcm(page_size, granularity) // page_size
        self._free = list(reversed(range(count)))
        self._index: dict[_Place, _Shared] = {}
        self._unowned: OrderedDict[_Shared, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages with nothing in them."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Published pages without an owner: they are given away when the free ones do not suffice."""
        return len(self._unowned)

    @property
    def used(self) -> int:
        """Pages that requests hold."""
        return self.count - self.free - self.cached

    def pages_for(self, tokens: int) -> int:
        """The number of pages that hold this number of tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, tokens: Sequence[int], capacity: int, key: Hashable) -> Held | None:
        """Pages for a prompt and what follows it, `capacity` tokens in all; None if there is not enough room now.

        key: all that keys and values depend on besides the tokens before them; equal keys share pages. At least the
        prompt's last token is left to be read.
        """
        if not 1 <= len(tokens) <= capacity:
            raise ValueError(f"a prompt of {len(tokens)} tokens and room for {capacity}: needs 1 <= prompt <= room")
        if self.pages_for(capacity) > self.count:
            raise ValueError(f"{capacity} tokens need {self.pages_for(capacity)} pages, of {self.count} that there are")
        prompt = tuple(tokens)
        shared = self._find(prompt, key)
        missing = self.pages_for(capacity) - len(shared)
        if missing > self.free + self.cached - sum(page.owners == 0 for page in shared):
            return None
        for page in shared:
            self._own(page)
        pages = [page.page for page in shared] + [self._take() for _ in range(missing)]
        cached_tokens = len(shared) * self.page_size
        self.cached_tokens += cached_tokens
        return Held(pages, cached_tokens, prompt, key, shared)

    def publish(self, held: Held, prompt_tokens_done: int) -> None:
        """Lets others share the pages that are full with the first `prompt_tokens_done` tokens of the prompt.

        If another request has published the same tokens meanwhile, that page is the one that is shared; the request
        keeps its own too, and is an owner of both.
        """
        self._check_held(held)
        if prompt_tokens_done > len(held._tokens):
            raise ValueError(f"{prompt_tokens_done} tokens done, of a prompt of {len(held._tokens)}")
        for i in range(len(held._shared), prompt_tokens_done // self.page_size):
            parent = held._shared[-1] if held._shared else None
            place = (parent, held._key, self._tokens_of_page(held._tokens, i))
            page = self._index.get(place)
            if page is None:
                page = self._index[place] = _Shared(held.pages[i], place, owners=1)
            else:
                self._own(page)
            held._shared.append(page)

    def release(self, held: Held) -> None:
        """The request has ended. Its published pages stay until room is needed; the others are free."""
        self._check_held(held)
        held._released = True
        published = {page.page for page in held._shared}
        self._free += [page for page in reversed(held.pages) if page not in published]
        for page in reversed(held._shared):
            page.owners -= 1
            if page.owners == 0:
                self._unowned[page] = None

    def _check_held(self, held: Held) -> None:
        if held._released:
            raise ValueError("these pages have been released")

    def _tokens_of_page(self, tokens: tuple[int, ...], i: int) -> tuple[int, ...]:
        return tokens[i * self.page_size : (i + 1) * self.page_size]

    def _find(self, prompt: tuple[int, ...], key: Hashable) -> list[_Shared]:
        """The published pages that this prompt begins with, but for its last token."""
        found: list[_Shared] = []
        for i in range((len(prompt) - 1) // self.page_size):
            page = self._index.get((found[-1] if found else None, key, self._tokens_of_page(prompt, i)))
            if page is None:
                break
            found.append(page)
        return found[: len(found) // self._stride * self._stride]

    def _own(self, page: _Shared) -> None:
        if page.owners == 0:
            del self._unowned[page]
        page.owners += 1

    def _take(self) -> int:
        """A free page; if there is none, the unowned one that was released first."""
        if not self._free:
            page, _ = self._unowned.popitem(last=False)
            del self._index[page.place]
            self._free.append(page.page)
        return self._free.pop()
