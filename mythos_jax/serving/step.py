"""The steps of the engine: in each, one loop for all places that are occupied, and all that follows from it."""

import jax
import jax.numpy as jnp

from mythos_jax.model.cache import Cache
from mythos_jax.serving.places import EMPTY, LOOPING, WAITING, Places, Setup, Terms, Work, put, rows, seen_pages
from mythos_jax.serving.policy import is_done, run_loop
from mythos_jax.serving.probe import halt_by_logits
from mythos_jax.serving.readout import News, Reads, read_out

MAX_STEPS = 8  # of one call


def steps(setup: Setup, places: Places, at_K: jax.Array, count: jax.Array, pages: int) -> tuple[Places, News]:
    """`count` steps of the places at `at_K`, at most MAX_STEPS: each runs one loop, reads out the tokens that are at
    the end of theirs, and begins those that come next.

    at_K: int32, with all places of a ring or none; P stands for no place. pages: how many of a row's pages are in use.
    Returns the news of each step, [MAX_STEPS, ...].
    """
    P = len(places.work.phase_P)
    terms, work = rows((places.terms, places.work), jnp.minimum(at_K, P - 1))
    terms = terms.replace(pages_PN=terms.pages_PN[:, :pages])
    work = work.replace(phase_P=jnp.where(at_K < P, work.phase_P, EMPTY))
    row_P = jnp.zeros(P, jnp.int32).at[at_K].set(jnp.arange(len(at_K), dtype=jnp.int32), mode="drop")
    next_K = row_P[terms.next_P]

    def one(work: Work, pool: Cache) -> tuple[Work, Cache, News]:
        loops_K = work.phase_P == LOOPING
        work, pool = _loop(setup, terms, work, pool, loops_K)
        work, pool, news = read_out(setup, terms, work, pool, _reads(terms, work, next_K))
        return work, pool, news.replace(ran=loops_K.sum(dtype=jnp.int32))

    def body(i: jax.Array, carry: tuple[Work, Cache, News]) -> tuple[Work, Cache, News]:
        work, pool, all_news = carry
        work, pool, news = one(work, pool)
        return work, pool, jax.tree.map(lambda x, new: x.at[i].set(new), all_news, news)

    no_news = jax.eval_shape(one, work, places.pool)[2]
    no_news = jax.tree.map(lambda x: jnp.zeros((MAX_STEPS, *x.shape), x.dtype), no_news)
    work, pool, all_news = jax.lax.fori_loop(0, count, body, (work, places.pool, no_news))
    return Places(places.terms, put(places.work, at_K, work), pool), all_news


def _loop(setup: Setup, terms: Terms, work: Work, pool: Cache, loops_K: jax.Array) -> tuple[Work, Cache]:
    """One loop of the rows of `loops_K`; those that come to the end of theirs wait."""
    policy, c = terms.policy, setup.model.config
    cache = pool.at(seen_pages(pool, terms.pages_PN, loops_K), work.position_P)
    loop_K = jnp.where(loops_K, work.loop_P, policy.limit_B)  # at its limit a row stays as it is
    predicted_K1 = work.predicted_P[:, None]
    tokens, cache = run_loop(setup.model, setup.variables, work.tokens, cache, policy, loop_K, predicted_K1)
    work = work.replace(tokens=tokens, loop_P=work.loop_P + loops_K)
    if c.freeze_halted and c.readout != "act":  # such a model can follow a policy that looks at the logits
        work, cache = halt_by_logits(setup, terms, work, cache, loops_K & policy.reads_logits_B)
    done_K = is_done(c, policy, work.tokens, loop_K)[:, 0]
    return work.replace(phase_P=jnp.where(loops_K & done_K, WAITING, work.phase_P)), cache.pool()


def _reads(terms: Terms, work: Work, next_K: jax.Array) -> Reads:
    """Whose tokens are read out: a token that is done, if all before it are final; and once before, for a draft, if
    the next place is free."""
    final_K = (work.phase_P == WAITING) & work.head_P
    # One that has halted before that is as deep as it will be.
    deep_K = (work.phase_P == WAITING) | ((work.phase_P == LOOPING) & (work.loop_P >= terms.draft_loops_P))
    draft_K = (terms.draft_loops_P > 0) & deep_K & ~final_K & ~work.drafted_P & (work.phase_P[next_K] == EMPTY)
    return Reads(final_K, draft_K, next_K)
