"""The end of a token's loops: coda, head, the next token, and that one's beginning, for all tokens that are at it.

K rows are being run; those that are to be read out are gathered into a batch of k rows, one of few sizes, so that
tokens in the middle of their loops pay nothing for it.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.inference.sampling import Sampling, sample
from mythos_jax.model.apply import apply
from mythos_jax.model.cache import Cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.serving.places import EMPTY, Setup, Terms, Work, begin, new_work, put, rows, run_if, seen_pages
from mythos_jax.serving.request import MAX_ALTERNATIVES

NOTHING, FINAL, DRAFT = 0, 1, 2  # what a row has brought


class Sampled(struct.PyTreeNode):
    """The next tokens of rows, and what is known of them.

    token_K: int32. finite_K: bool, the logits are finite. logprob_K: float32, of the token; top_KA, top_logprob_KA: the
    most likely tokens and theirs; these three are 0 where no row asks for them.
    """

    token_K: jax.Array
    finite_K: jax.Array
    logprob_K: jax.Array
    top_KA: jax.Array
    top_logprob_KA: jax.Array


class News(struct.PyTreeNode):
    """What a step has brought, for each of its rows.

    kind_K: int32. position_K: int32, the place of the next token in the text. loops_K: int32, spent on it. ended_K:
    bool, the request is complete with it. ran: int32 [], loops that were run, by all rows together.
    """

    kind_K: jax.Array
    position_K: jax.Array
    loops_K: jax.Array
    ended_K: jax.Array
    sampled: Sampled
    ran: jax.Array


class Reads(NamedTuple):
    """Which rows are read out: those of `final_K`, whose tokens have run their loops, and those of `draft_K`, whose
    tokens loop on. next_K: int32, the row of each one's next place."""

    final_K: jax.Array
    draft_K: jax.Array
    next_K: jax.Array

    @property
    def all_K(self) -> jax.Array:
        return self.final_K | self.draft_K


def nothing_sampled(count: int) -> Sampled:
    int_K, float_K = jnp.zeros(count, jnp.int32), jnp.zeros(count)
    shape = count, MAX_ALTERNATIVES
    return Sampled(int_K, jnp.ones(count, bool), float_K, jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def choose(logits_BV: jax.Array, sampling: Sampling, position_B: jax.Array, wanted: jax.Array) -> Sampled:
    """The tokens at `position_B`. wanted: bool [], whether a row asks for log-probabilities."""
    token_B = sample(logits_BV, sampling, position_B)
    nothing = nothing_sampled(len(token_B))

    def log_probabilities(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        log_BV = jax.nn.log_softmax(logits_BV)
        of_token_B = jnp.take_along_axis(log_BV, token_B[:, None], axis=-1)[:, 0]
        count = min(MAX_ALTERNATIVES, logits_BV.shape[-1])
        top_BA, tokens_BA = jax.lax.top_k(log_BV, count)
        missing = [(0, 0), (0, MAX_ALTERNATIVES - count)]
        return of_token_B, jnp.pad(tokens_BA, missing), jnp.pad(top_BA, missing, constant_values=-jnp.inf)

    def none(_: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return nothing.logprob_K, nothing.top_KA, nothing.top_logprob_KA

    finite_B = jnp.isfinite(logits_BV).all(-1)
    return Sampled(token_B, finite_B, *jax.lax.cond(wanted, log_probabilities, none, logits_BV))


class Settled(NamedTuple):
    """What the read-outs of a step lead to, bool [K]: the rows whose requests are complete, those of drafts that no
    longer count, and those whose next tokens begin. work: the rows without what has left its place, and without those
    next tokens."""

    ended_K: jax.Array
    cleared_K: jax.Array
    begins_K: jax.Array
    work: Work


def settle(terms: Terms, work: Work, reads: Reads, token_K: jax.Array) -> Settled:
    """Compares final tokens with the drafts that went on in their place.

    A final token leaves its place. If a draft with the same token follows it, that one is the first of its ring now;
    else all drafts of the ring are cleared, and the token begins.
    """
    final_K, draft_K, next_K = reads
    stops_K = (terms.stops_PS == token_K[:, None]).any(-1)
    complete_K = stops_K | (work.position_P + 1 >= terms.last_P)
    ended_K = final_K & complete_K
    has_draft_K = (next_K != jnp.arange(len(next_K))) & (work.phase_P[next_K] != EMPTY)
    same_K = work.tokens.inputs.tokens_BT[next_K, 0] == token_K
    confirmed_K = final_K & ~complete_K & has_draft_K & same_K
    breaks_K = final_K & ~confirmed_K
    cleared_K = (breaks_K & (terms.ring_P[:, None] == terms.ring_P)).any(-1)
    none = len(next_K)
    work = work.replace(
        phase_P=jnp.where(final_K | cleared_K, EMPTY, work.phase_P),
        head_P=work.head_P.at[jnp.where(confirmed_K, next_K, none)].set(True, mode="drop"),
        drafted_P=work.drafted_P | draft_K,
    )
    return Settled(ended_K, cleared_K, (breaks_K & ~ended_K) | (draft_K & ~cleared_K & ~complete_K), work)


def read_out(setup: Setup, terms: Terms, work: Work, pool: Cache, reads: Reads) -> tuple[Work, Cache, News]:
    """Reads out the rows of `reads`, and begins the tokens that follow them."""
    reads_K = reads.all_K
    count, order_K = reads_K.sum(), jnp.argsort(~reads_K, stable=True)
    wanted, nothing_K = (reads_K & terms.logprobs_P).any(), jnp.zeros_like(reads_K)
    result = work, pool, nothing_sampled(len(reads_K)), nothing_K, nothing_K
    smaller = 0
    for size in batch_sizes(len(reads_K)):

        def batch(result: Any, size: int = size) -> Any:
            return _batch(setup, terms, result[0], result[1], reads, order_K[:size], wanted)

        result = run_if((smaller < count) & (count <= size), batch, result)
        smaller = size
    new_work, pool, sampled, ended_K, cleared_K = result
    drafts_K = reads.draft_K & ~cleared_K
    news = News(
        kind_K=jnp.where(reads.final_K, FINAL, jnp.where(drafts_K, DRAFT, NOTHING)),
        position_K=work.position_P + 1,
        loops_K=work.tokens.loops_BT[:, 0],
        ended_K=ended_K,
        sampled=sampled,
        ran=jnp.int32(0),
    )
    return new_work, pool, news


def batch_sizes(count: int) -> list[int]:
    """How many rows are read out together, ascending: few sizes, since each is compiled."""
    return sorted({-(-count // 4), -(-count // 2), count})


def _batch(
    setup: Setup, terms: Terms, work: Work, pool: Cache, reads: Reads, at_k: jax.Array, wanted: jax.Array
) -> tuple[Work, Cache, Sampled, jax.Array, jax.Array]:
    """`read_out` for the rows at `at_k`, among which all are that are to be read out."""
    some, their, reads_k = rows(work, at_k), rows(terms, at_k), reads.all_K[at_k]
    cache = pool.at(seen_pages(pool, their.pages_PN, reads_k), some.position_P)

    def finish(model: Mythos) -> tuple[jax.Array, Cache]:
        out = model.finish(some.tokens, cache, logits=False)
        return model.head(out.features)[:, 0], cast(Cache, out.cache)

    logits_kV, cache = apply(finish, setup.model, setup.variables)
    position_k = some.position_P + 1
    sampled_k = choose(logits_kV, their.sampling, position_k, wanted)
    sampled = put(nothing_sampled(len(work.position_P)), jnp.where(reads_k, at_k, len(work.position_P)), sampled_k)
    settled = settle(terms, work, reads, sampled.token_K)

    begins_k = settled.begins_K[at_k]
    cache = cache.at(seen_pages(pool, their.pages_PN, begins_k), position_k)
    tokens, cache = begin(setup, their.sampling, sampled_k.token_K[:, None], begins_k[:, None], cache)
    new = new_work(setup, their.policy, tokens, position_k, reads.final_K[at_k])
    target_k = jnp.where(begins_k, reads.next_K[at_k], len(work.position_P))
    return put(settled.work, target_k, new), cache.pool(), sampled, settled.ended_K, settled.cleared_K
