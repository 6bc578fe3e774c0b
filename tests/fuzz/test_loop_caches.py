"""What a cache holds, and what queries see in it, against the definition: rows at different loops, tokens that halt
after different loops, waiting rows, drafts behind the token before them. `make fuzz` tries 1,000 series of each rule.

Keys are numbers that say which text, position and loop made them.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_jax.model.cache import KV, LayerCache, fill_skipped_loops, loop_slots, update_cache
from tests.fuzz.budget import budget

LOOPS, LENGTH, PAGE = 5, 6, 2
SLOT_OF = {"all": lambda t: t, "last": lambda t: 0, "first": lambda t: min(t, 1), "modulo:3": lambda t: t % 3}
# Rows 0 and 1 are two places of one text where tokens may follow each other in depth, row 2 has a text of its own.
ROWS, TEXT = 3, (0, 0, 1)
TABLE = np.array([[4, 1, 6], [4, 1, 6], [2, 5, 0]])


def number(text, position, loop):
    return 1 + loop + 10 * position + 100 * text


@cache
def step():
    @partial(jax.jit, donate_argnums=0)
    def run(layer, new_B, loop_B, index_B, frozen_B, halts_B):
        new, index_B1 = KV(new_B[:, None, None, None], None), index_B[:, None]
        layer, seen = update_cache(layer, new, loop=loop_B, index_BT=index_B1, frozen_BT=frozen_B[:, None])
        (layer,) = fill_skipped_loops((layer,), (layer.exit_kv,), loop_B + 1, index_B1, halts_B[:, None])
        return layer, seen.keys[..., 0, 0]

    return run


class Series:
    """ran: loops that each token of a text has run. filled: those whose loops have ended, everywhere in the cache.
    exits: after how many loops a token halts."""

    def __init__(self, rule, paged, random):
        self.rule, self.paged, self.random = rule, paged, random
        slots = loop_slots(rule, LOOPS)
        shape = (slots, 7, PAGE) if paged else (slots, ROWS, LENGTH)
        old = jnp.full((*shape, 1, 1), jnp.nan)  # what an earlier user left
        exit_kv = KV(jnp.zeros((ROWS, 1, 1, 1)), None)
        self.layer = LayerCache(KV(old, None), exit_kv, jnp.asarray(TABLE) if paged else None, loop_cache=rule)
        self.exits = random.integers(1, LOOPS + 1, (2, LENGTH))
        self.ran, self.filled = np.zeros((2, LENGTH), int), np.zeros((2, LENGTH), bool)
        # The position of each row's token; a row lingers where its token has halted and the call goes on to all loops.
        self.at, self.loop, self.lingers = [0, 1, 0], [0, 0, 0], [False] * 3
        self.drafts = paged and rule == "all"

    def holds(self, text, position, slot):
        """The definition: the last loop in this slot that the token ran; its exit loop, if it skipped them; or None,
        what nobody may look at."""
        ran = self.ran[text, position]
        loops = [t for t in range(ran) if SLOT_OF[self.rule](t) == slot]
        if loops:
            return number(text, position, loops[-1])
        return number(text, position, ran - 1) if self.filled[text, position] else None

    def may_run(self, row):
        text, position = TEXT[row], self.at[row]
        if position >= LENGTH or (row == 1 and not self.drafts):
            return False
        # The token before it has been there: it has run more loops, or as many in this step, or has halted.
        behind = position == 0 or self.filled[text, position - 1] or self.ran[text, position - 1] > self.loop[row]
        return behind and self.random.random() < 0.7

    def advance(self):
        index, loop, new = np.full(ROWS, LENGTH), np.full(ROWS, LOOPS), np.full(ROWS, np.nan, np.float32)
        frozen, halts = np.ones(ROWS, bool), np.zeros(ROWS, bool)
        running = [row for row in range(ROWS) if self.may_run(row)]
        for row in running:
            text, position, t = TEXT[row], self.at[row], self.loop[row]
            index[row], loop[row], frozen[row] = position, t, self.lingers[row]
            new[row] = -1 if frozen[row] else number(text, position, t)  # of a frozen token it must not count
            self.ran[text, position] += not frozen[row]
            stops = t + 1 == self.exits[text, position] and self.random.random() < 0.5
            self.lingers[row] |= t + 1 == self.exits[text, position] and not stops
            halts[row] = stops or t + 1 == LOOPS
        self.layer, seen = step()(self.layer, new, loop, index, frozen, halts)
        for row in running:
            slot = SLOT_OF[self.rule](loop[row])
            for position in range(index[row] + 1):
                expected = self.holds(TEXT[row], position, slot)
                if self.lingers[row] and position == index[row]:  # it has been written by now, or was before
                    expected = expected or number(TEXT[row], position, self.ran[TEXT[row], position] - 1)
                assert seen[row, position] == expected, (row, position, slot)
            assert not seen[row, index[row] + 1 :].any() or not self.paged
        for row in running:
            self.loop[row] += 1
            if halts[row]:
                self.filled[TEXT[row], self.at[row]] = True
                self.at[row] += 2 if row < 2 and self.drafts else 1
                self.loop[row], self.lingers[row] = 0, False


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("rule", SLOT_OF)
@given(seed=st.integers(0, 2**32 - 1))
@budget(4, 1000)
def test_a_cache_holds_what_its_rule_says(rule, paged, seed):
    series = Series(rule, paged, np.random.default_rng(seed))
    while not series.filled.all():
        series.advance()
    keys = np.asarray(series.layer.kv.keys)[..., 0, 0]
    rows = keys[:, TABLE[[0, 2]]].reshape(len(keys), 2, LENGTH) if paged else keys[:, [0, 2]]
    for slot, text, position in np.ndindex(rows.shape):
        assert rows[slot, text, position] == series.holds(text, position, slot)
    if paged:
        assert np.isnan(keys[:, 3]).all()  # a page that is in no table
