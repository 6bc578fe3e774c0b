"""Pages of the cache: who owns them, what of them is shared, what goes first. tests/fuzz has every order."""

import time

import pytest

from mythos_jax.serving.pages import Pages

SYSTEM = list(range(100, 108))  # two pages of four tokens


def finished(pages, prompt, capacity=None, key="policy"):
    """A request that has come and gone."""
    held = pages.allocate(prompt, capacity or len(prompt), key)
    pages.publish(held, len(prompt))
    pages.release(held)
    return held


def counts(pages):
    return pages.used, pages.cached, pages.free


def test_all_pages_are_given_at_once_and_come_back():
    pages = Pages(5, 4)
    first = pages.allocate([1, 2, 3], 9, "policy")
    assert (len(first.pages), first.cached_tokens, counts(pages)) == (3, 0, (3, 0, 2))
    assert pages.allocate([1, 2, 3], 9, "policy") is None
    second = pages.allocate([1, 2, 3], 8, "policy")
    assert sorted(first.pages + second.pages) == [0, 1, 2, 3, 4]
    pages.release(first)
    assert counts(pages) == (2, 0, 3)
    pages.release(second)
    assert counts(pages) == (0, 0, 5)


def test_a_prompt_is_shared_as_soon_as_its_pages_are_full_and_read():
    pages = Pages(9, 4)
    first = pages.allocate([*SYSTEM, 1, 2], 12, "policy")
    pages.publish(first, 7)
    second = pages.allocate([*SYSTEM, 3], 12, "policy")
    assert second.cached_tokens == 4
    assert second.pages[0] == first.pages[0]
    assert not set(first.pages[1:]) & set(second.pages[1:])
    pages.publish(first, 8)
    third = pages.allocate([*SYSTEM, 4, 5, 6, 7], 12, "policy")
    assert third.cached_tokens == 8
    assert third.pages[:2] == first.pages[:2]
    assert counts(pages) == (6, 0, 3)
    assert pages.cached_tokens == 12


def test_shared_pages_outlive_the_request_that_filled_them():
    pages = Pages(4, 4)
    first = pages.allocate([*SYSTEM, 1], 12, "policy")
    pages.publish(first, 9)
    second = pages.allocate([*SYSTEM, 2], 12, "policy")
    pages.release(first)
    assert counts(pages) == (3, 0, 1)
    assert pages.allocate([3], 5, "policy") is None  # the two that are shared are still owned
    pages.release(second)
    assert counts(pages) == (0, 2, 2)
    assert pages.allocate([*SYSTEM, 3], 12, "policy").pages[:2] == second.pages[:2]


def test_the_last_token_of_a_prompt_is_always_left_to_read():
    pages = Pages(8, 4)
    finished(pages, SYSTEM)
    assert pages.allocate(SYSTEM, 8, "policy").cached_tokens == 4
    assert pages.allocate([*SYSTEM, 1], 9, "policy").cached_tokens == 8


def test_other_keys_and_other_tokens_share_nothing():
    pages = Pages(12, 4)
    finished(pages, [*SYSTEM, 1])
    assert pages.allocate([*SYSTEM, 1], 9, "other policy").cached_tokens == 0
    assert pages.allocate([7, *SYSTEM[1:], 1], 9, "policy").cached_tokens == 0  # equal second page, another first one
    assert pages.allocate([*SYSTEM[:7], 7, 1], 9, "policy").cached_tokens == 4


def test_tokens_are_compared_not_only_their_hashes():
    assert hash((-1, 5)) == hash((-2, 5))
    pages = Pages(8, 2)
    finished(pages, [-1, 5, 0])
    assert pages.allocate([-2, 5, 0], 3, "policy").cached_tokens == 0


def test_hits_are_multiples_of_the_granularity():
    pages = Pages(16, 4, granularity=6)
    finished(pages, list(range(40)))
    lengths = {length: pages.allocate(list(range(length)), length, "policy") for length in (12, 13, 24, 25)}
    assert {length: held.cached_tokens for length, held in lengths.items()} == {12: 0, 13: 12, 24: 12, 25: 24}


def test_the_prompt_released_longest_ago_goes_first_and_from_its_end():
    pages = Pages(6, 4)
    old, new = [*range(8), 0], [*range(50, 58), 0]
    finished(pages, old)
    finished(pages, new)
    assert counts(pages) == (0, 4, 2)
    finished(pages, old)  # is now the newer one
    pages.release(pages.allocate([9], 12, "policy"))  # takes one page more than is free
    assert counts(pages) == (0, 3, 3)
    assert pages.allocate(new, 9, "policy").cached_tokens == 4
    assert pages.allocate(old, 9, "policy").cached_tokens == 8


def test_no_page_is_taken_from_the_prompt_that_wants_it():
    pages = Pages(3, 4)
    first = finished(pages, [*SYSTEM, 1])
    assert counts(pages) == (0, 2, 1)
    again = pages.allocate([*SYSTEM, 2], 12, "policy")
    assert again.cached_tokens == 8
    assert again.pages[:2] == first.pages[:2]
    assert counts(pages) == (3, 0, 0)


def test_a_refusal_changes_nothing():
    pages = Pages(4, 4)
    finished(pages, [*SYSTEM, 1])
    other = pages.allocate([5], 8, "policy")
    assert pages.allocate([*SYSTEM, 2], 16, "policy") is None
    assert counts(pages) == (2, 2, 0)
    assert pages.cached_tokens == 0
    pages.release(other)
    assert pages.allocate([*SYSTEM, 2], 16, "policy").cached_tokens == 8


def test_two_that_read_the_same_at_once():
    """The later one's page is not shared, what follows it is; both hold on to the first one's page."""
    pages = Pages(8, 4)
    first, second = (pages.allocate([*SYSTEM, *more], 12, "policy") for more in ([1, 1, 1, 1], [2, 2, 2, 2]))
    pages.publish(first, 12)
    pages.publish(second, 12)
    pages.release(first)
    assert counts(pages) == (5, 1, 2)  # the second one's three, and two that it owns as well
    third = pages.allocate([*SYSTEM, 2, 2, 2, 2, 0], 13, "policy")
    assert third.pages[:3] == [*first.pages[:2], second.pages[2]]
    pages.release(second)
    pages.release(third)
    assert counts(pages) == (0, 4, 4)


def test_misuse_is_an_error():
    pages = Pages(2, 4)
    with pytest.raises(ValueError, match="prompt of 0 tokens"):
        pages.allocate([], 4, "policy")
    with pytest.raises(ValueError, match="prompt of 5 tokens and room for 4"):
        pages.allocate([1] * 5, 4, "policy")
    with pytest.raises(ValueError, match="9 tokens need 3 pages, of 2"):
        pages.allocate([1], 9, "policy")
    held = pages.allocate([1], 4, "policy")
    with pytest.raises(ValueError, match="2 tokens done, of a prompt of 1"):
        pages.publish(held, 2)
    pages.release(held)
    with pytest.raises(ValueError, match="released"):
        pages.release(held)
    with pytest.raises(ValueError, match="released"):
        pages.publish(held, 1)
    assert counts(pages) == (0, 0, 2)
    with pytest.raises(ValueError, match="at least 1"):
        Pages(0, 4)


def test_work_is_that_of_the_request_not_of_all_pages():
    """A full cache of 40,000 pages is as fast as one of 2,000."""

    def seconds(count):
        pages = Pages(count, 1)
        for i in range(count // 2):
            finished(pages, [i, i])
        start = time.process_time()
        for i in range(2000):
            finished(pages, [-i, i])
        return time.process_time() - start

    # Once is enough: other work on the machine may slow one measurement.
    assert any(seconds(40_000) < 10 * min(seconds(2_000) for _ in range(3)) for _ in range(3))
