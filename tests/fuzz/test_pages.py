"""Pages of the cache against a naive model of them, under requests in every order.

Each page has simulated contents, which the requests write and find as the engine does. `make fuzz` tries 3,000 series.
"""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mythos_jax.serving.pages import Pages
from tests.fuzz.budget import budget

PROMPTS = st.builds(lambda zeros, ones: (0,) * zeros + (1,) * ones, st.integers(1, 12), st.integers(0, 4))
WHICH = st.integers(0, 8)  # of the running requests
KEYS = st.sampled_from(["shallow", "deep"])


class Requests(RuleBasedStateMachine):
    """`published`: each shared prefix (key and tokens, of full pages) with its page, owners and time of release."""

    @initialize(count=st.integers(1, 9), page_size=st.integers(1, 3), stride=st.integers(1, 3))
    def start(self, count, page_size, stride):
        self.pages, self.size, self.stride = Pages(count, page_size, stride * page_size), page_size, stride
        self.count, self.contents = count, {}
        self.running: list[dict] = []
        self.published: dict[tuple, dict] = {}
        self.clock = self.hits = 0

    # What is true of pages, computed anew from the whole model.
    def unowned(self):
        return [prefix for prefix, entry in self.published.items() if not entry["owners"]]

    def held_pages(self):
        shared = {entry["page"] for entry in self.published.values() if entry["owners"]}
        return shared | {page for request in self.running for page in request["held"].pages}

    def evicted(self, room):
        """Removes what was released longest ago, among prefixes without a longer one, until there is room."""
        while self.count - len(self.held_pages()) - len(self.unowned()) < room:
            leaves = [
                (key, tokens)
                for key, tokens in self.unowned()
                if not any(k == key and len(t) > len(tokens) and t[: len(tokens)] == tokens for k, t in self.published)
            ]
            del self.published[min(leaves, key=lambda prefix: self.published[prefix]["released"])]

    @rule(prompt=PROMPTS, more=st.integers(0, 6), key=KEYS)
    def begin(self, prompt, more, key):
        capacity = len(prompt) + more
        needed = -(-capacity // self.size)
        if needed > self.count:
            with pytest.raises(ValueError, match="pages"):
                self.pages.allocate(prompt, capacity, key)
            return
        hit = 0
        while hit + self.size < len(prompt) and (key, prompt[: hit + self.size]) in self.published:
            hit += self.size
        hit -= hit % (self.stride * self.size)
        mine = [(key, prompt[: end + self.size]) for end in range(0, hit, self.size)]
        kept = self.held_pages() | {self.published[prefix]["page"] for prefix in mine}
        held = self.pages.allocate(prompt, capacity, key)
        assert (held is None) == (needed - len(mine) > self.count - len(kept))
        if held is None:
            return
        assert held.cached_tokens == hit
        assert len(set(held.pages)) == len(held.pages) == needed
        for prefix in mine:
            self.published[prefix]["owners"] += 1
        self.evicted(needed - len(mine))
        assert not set(held.pages[len(mine) :]) & (
            self.held_pages() | {entry["page"] for entry in self.published.values()}
        ), "a page that others still hold or share"
        self.hits += hit
        request = {"held": held, "prompt": prompt, "key": key, "read": hit, "owns": mine}
        self.running.append(request)
        self.check_contents(request)
        for page in held.pages[len(mine) :]:
            self.contents[page] = "unread"

    def check_contents(self, request):
        """All tokens of the prompt that have been read are where the request looks for them."""
        for i in range(request["read"] // self.size):
            assert self.contents[request["held"].pages[i]] == (request["key"], request["prompt"][: (i + 1) * self.size])

    @precondition(lambda self: self.running)
    @rule(which=WHICH, tokens=st.integers(1, 14))
    def read(self, which, tokens):
        request = self.running[which % len(self.running)]
        held, prompt = request["held"], request["prompt"]
        first, request["read"] = request["read"], min(request["read"] + tokens, len(prompt))
        for i in range(first // self.size, -(-request["read"] // self.size)):
            full = (i + 1) * self.size <= request["read"]
            self.contents[held.pages[i]] = (request["key"], prompt[: (i + 1) * self.size]) if full else "partly read"
        if request["read"] == len(prompt):  # the answer follows
            for page in held.pages[len(prompt) // self.size :]:
                self.contents[page] = "answer"

    @precondition(lambda self: self.running)
    @rule(which=WHICH)
    def publish(self, which):
        request = self.running[which % len(self.running)]
        self.pages.publish(request["held"], request["read"])
        for i in range(len(request["owns"]), request["read"] // self.size):
            prefix = (request["key"], request["prompt"][: (i + 1) * self.size])
            entry = self.published.setdefault(prefix, {"page": request["held"].pages[i], "owners": 0, "released": None})
            entry["owners"] += 1
            request["owns"].append(prefix)

    @precondition(lambda self: self.running)
    @rule(which=WHICH)
    def release(self, which):
        self.leave(self.running.pop(which % len(self.running)))

    def leave(self, request):
        self.pages.release(request["held"])
        for prefix in reversed(request["owns"]):
            self.clock += 1
            self.published[prefix]["owners"] -= 1
            self.published[prefix]["released"] = self.clock

    @invariant()
    def every_page_is_counted_once(self):
        if not hasattr(self, "pages"):
            return
        held, unowned = self.held_pages(), {self.published[prefix]["page"] for prefix in self.unowned()}
        assert not held & unowned
        assert (self.pages.used, self.pages.cached) == (len(held), len(unowned))
        assert self.pages.free == self.count - len(held) - len(unowned) >= 0
        assert self.pages.cached_tokens == self.hits

    @invariant()
    def nobody_writes_in_pages_of_others(self):
        for request in getattr(self, "running", []):
            self.check_contents(request)
        for (key, tokens), entry in getattr(self, "published", {}).items():
            assert self.contents[entry["page"]] == (key, tokens)

    def teardown(self):
        """All requests leave; one that needs every page then gets them."""
        if not hasattr(self, "pages"):
            return
        while self.running:
            self.leave(self.running.pop())
        assert self.pages.used == 0
        held = self.pages.allocate([2], self.count * self.size, "alone")
        assert sorted(held.pages) == list(range(self.count))
        assert not held.cached_tokens
        self.pages.release(held)
        assert self.pages.free == self.count
        assert not self.pages._index
        assert not self.pages._unowned


def test_pages_are_those_of_a_naive_model():
    run_state_machine_as_test(Requests, settings=budget(40, 3000))
