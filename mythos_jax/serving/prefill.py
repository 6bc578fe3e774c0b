"""Reading a prompt: a chunk of it through all its loops; the last chunk also gives the first new token."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from mythos_jax.model.apply import apply
from mythos_jax.model.cache import Cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import TokenState
from mythos_jax.serving.places import EMPTY, Places, Setup, Terms, begin, new_work, put, seen_pages
from mythos_jax.serving.policy import is_done, predictions, run_loop
from mythos_jax.serving.readout import FINAL, NOTHING, News, choose


class Chunk(NamedTuple):
    """Tokens of a prompt, and what their request asks for.

    ring_P: int32, the places of the request in their order; P stands for no place. terms: of the first, [1, ...].
    tokens_C: int32, `length` of them, the rest is padding. start: int32, the position of the first. is_last: bool, the
    prompt ends with it.
    """

    ring_P: jax.Array
    terms: Terms
    tokens_C: jax.Array
    length: jax.Array
    start: jax.Array
    is_last: jax.Array


def prefill(setup: Setup, places: Places, chunk: Chunk, pages: int) -> tuple[Places, News]:
    """Reads a chunk, which follows what the request's pages hold. pages: how many of them are in use."""
    places, at_1 = _admit(places, chunk), chunk.ring_P[:1]
    terms = chunk.terms.replace(pages_PN=chunk.terms.pages_PN[:, :pages])
    start_1, length_1 = jnp.reshape(chunk.start, 1), jnp.reshape(chunk.length, 1)
    active_1C = jnp.arange(len(chunk.tokens_C)) < length_1[:, None]
    cache = places.pool.at(terms.pages_PN, start_1)
    tokens, cache = begin(setup, terms.sampling, chunk.tokens_C[None], active_1C, cache)
    tokens, cache, ran = _all_loops(setup, terms, tokens, cache)

    def finish(model: Mythos) -> tuple[jax.Array, Cache]:
        out = model.finish(tokens, cache, logits=False)
        last_11D = jax.lax.dynamic_slice_in_dim(out.features, chunk.length - 1, 1, axis=1)
        return model.head(last_11D)[:, 0], cast(Cache, out.cache)

    logits_1V, cache = apply(finish, setup.model, setup.variables)
    position_1 = start_1 + length_1
    sampled = choose(logits_1V, terms.sampling, position_1, terms.logprobs_P.any())
    stops_1 = (terms.stops_PS == sampled.token_K[:, None]).any(-1)
    ended_1 = chunk.is_last & (stops_1 | (position_1 >= terms.last_P))

    begins_1 = chunk.is_last & ~ended_1
    cache = cache.at(seen_pages(places.pool, terms.pages_PN, begins_1), position_1)
    first, cache = begin(setup, terms.sampling, sampled.token_K[:, None], begins_1[:, None], cache)
    new = new_work(setup, terms.policy, first, position_1, jnp.ones(1, bool))
    work = put(places.work, jnp.where(begins_1, at_1, len(places.work.phase_P)), new)
    news = News(
        kind_K=jnp.where(chunk.is_last, FINAL, NOTHING)[None],
        position_K=position_1,
        loops_K=tokens.loops_BT[:, chunk.length - 1],
        ended_K=ended_1,
        sampled=sampled,
        ran=ran,
    )
    return Places(places.terms, work, cache.pool()), news


def _admit(places: Places, chunk: Chunk) -> Places:
    """The request's terms in all places of its ring, in which nothing is yet."""
    ring_P, count = chunk.ring_P, len(chunk.ring_P)
    after_P = jnp.append(ring_P[1:], count)
    next_P = jnp.where(after_P < count, after_P, ring_P[0])
    spread = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), chunk.terms)
    terms = put(places.terms, ring_P, spread.replace(next_P=next_P))
    phase_P = places.work.phase_P.at[ring_P].set(EMPTY, mode="drop")
    return places.replace(terms=terms, work=places.work.replace(phase_P=phase_P))


def _all_loops(setup: Setup, terms: Terms, tokens: TokenState, cache: Cache) -> tuple[TokenState, Cache, jax.Array]:
    """The tokens of a chunk [1, C] after all their loops, and how many loops they ran in all."""
    c, policy = setup.model.config, terms.policy.for_prompt()
    predicted_1C = predictions(setup.model, setup.variables, policy, tokens.inputs.injected_BTD)
    active_1C = tokens.inputs.active_BT

    def more(carry: tuple[jax.Array, TokenState, Cache, jax.Array]) -> jax.Array:
        t, tokens, _, _ = carry
        done_1C = is_done(c, policy, tokens, t - 1) | ~active_1C
        return (t < policy.limit_B[0]) & ((t == 0) | ~done_1C.all())

    def body(carry: tuple[jax.Array, TokenState, Cache, jax.Array]) -> tuple[jax.Array, TokenState, Cache, jax.Array]:
        t, tokens, cache, ran = carry
        running_1C = active_1C & ~(is_done(c, policy, tokens, t - 1) & (t > 0))
        tokens, cache = run_loop(setup.model, setup.variables, tokens, cache, policy, t, predicted_1C)
        return t + 1, tokens, cache, ran + running_1C.sum(dtype=jnp.int32)

    _, tokens, cache, ran = jax.lax.while_loop(more, body, (jnp.int32(0), tokens, cache, jnp.int32(0)))
    return tokens, cache, ran
