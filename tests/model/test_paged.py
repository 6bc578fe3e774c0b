"""The paged cache against the cache with a stretch of memory for each row: same tokens, pages in any order."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config import MeshConfig
from mythos_jax.model.cache import KV, Cache, LayerCache, init_cache, init_paged_cache, update_cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.sharding import make_mesh, use_mesh
from tests.model.test_cache import CUTS, LENGTHS, LOOPS, run_in_pieces
from tests.tiny import GQA, GQA_LAST, MLA, B, T, halting, run, run_traced, some_tokens, variables

PAGES, PAGE = 7, 4
NONE = PAGES  # an entry of the table that is no page
TABLE = np.array([[5, 2], [0, 6]], np.int32)
MOE_LAST = replace(GQA, readout="last", state_norm=True)


def apply(config, forward):
    return Mythos(config).apply(variables(config), method=forward)


def paged(config, rule="all"):
    """A pool whose pages are full of what must not matter."""
    pool = init_paged_cache(config, PAGES, PAGE, LOOPS, rule)
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, pool)


def seen(cache, table=TABLE):
    """Keys and values of all layers as rows see them, [slots, B, S, ...]."""
    layers = (*cache.prelude, *cache.loop, *cache.coda)
    if cache.prelude[0].pages is None:
        return [layer.kv for layer in layers]

    def rows(x):
        return x[:, table].reshape(x.shape[0], len(table), -1, *x.shape[3:])

    return [jax.tree.map(rows, layer.kv) for layer in layers]


def check_same_contents(got: Cache, expected: Cache, lengths=LENGTHS):
    for a, b in zip(jax.tree.leaves(seen(got)), jax.tree.leaves(seen(expected)), strict=True):
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(a[:, row, :length], b[:, row, :length])


@pytest.mark.parametrize(
    ("config", "rule", "policy", "loops"),
    [
        (GQA, "all", None, np.array([5, 2], np.int32)),
        (MLA, "all", halting("latent", 0.1), LOOPS),
        (MOE_LAST, "first", halting("latent", 0.25), LOOPS),
    ],
    ids=["gqa_act_moe_depth_by_row", "mla_latent", "moe_latent_first"],
)
def test_pages_in_any_order_give_what_rows_give(config, rule, policy, loops):
    """To the bit, with the keys and values in the cache; also for tokens that halt and leave theirs for deeper ones."""
    call = run if isinstance(loops, int) else run_traced
    feed = partial(run_in_pieces, config, some_tokens(), CUTS["chunk_then_tokens"], call=call, loops=loops)
    if policy is not None:
        feed = partial(feed, halting=policy)
    plain = feed(cache=init_cache(config, B, T, LOOPS, rule))
    pool = paged(config, rule).at(jnp.asarray(TABLE), jnp.zeros(B, jnp.int32))
    assert pool.capacity == 2 * PAGE
    got = feed(cache=pool)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(got[0][row, :length], plain[0][row, :length])
        np.testing.assert_array_equal(got[1][row, :length], plain[1][row, :length])
    np.testing.assert_array_equal(got[2].length_B, LENGTHS)
    check_same_contents(got[2], plain[2])
    untouched = np.setdiff1d(np.arange(PAGES), TABLE)
    assert all(np.isnan(leaf[:, untouched]).all() for leaf in jax.tree.leaves((got[2].pool().loop, got[2].pool().coda)))


@partial(jax.jit, static_argnames="config")
def begin(config, cache, token_B, policy):
    def forward(model):
        tokens, filled = model.begin(token_B[:, None], cache=cache)
        return model.loop(tokens, filled, loops=LOOPS, halting=policy, count=0)[:2]  # with all fields, for `step`

    return apply(config, forward)


@partial(jax.jit, static_argnames="config", donate_argnames=("tokens", "pool"))
def step(config, tokens, pool, pages_BN, loop_B, policy):
    """One loop for rows that are at different loops, and the read-out after it."""

    def forward(model):
        cache = pool.at(pages_BN, tokens.inputs.index_BT[:, 0] + 1)
        states, filled, _ = model.loop(tokens, cache, loops=LOOPS, halting=policy, start=loop_B, count=1)
        out = model.finish(states, filled)
        return states, out.cache.pool(), out.replace(cache=None)

    return apply(config, forward)


@pytest.mark.parametrize(
    ("config", "threshold"),
    [pytest.param(MOE_LAST, 0.25, marks=pytest.mark.slow), (MLA, 0.1)],
    ids=["moe", "mla"],
)
def test_rows_that_share_pages_see_each_other(config, threshold):
    """A draft begins while the token before it is still in its loops: two rows, one behind the other in depth, on the
    same pages. Both get what they get when one follows the other in a row of its own."""
    policy, row, behind = halting("latent", threshold), some_tokens()[:1], 2
    logits, ran, _ = run_in_pieces(config, row, [0, 4, 5, 6, 7], lengths=np.array([7]), halting=policy)
    table, empty = jnp.asarray(TABLE[:1]), jnp.zeros(1, jnp.int32)
    prompt = run_in_pieces(
        config, row, [0, 4, 5], lengths=np.array([5]), halting=policy, cache=paged(config).at(table, empty)
    )[2]
    table = jnp.concatenate([table, table])
    tokens, cache = begin(config, prompt.pool().at(table, jnp.array([5, 6])), jnp.asarray(row[0, 5:7]), policy)
    pool = cache.pool()
    for t in range(LOOPS + behind):
        # A row that waits is given its last loop: it does not run.
        loop_B = jnp.array([min(t, LOOPS), t - behind if t >= behind else LOOPS])
        tokens, pool, out = step(config, tokens, pool, table, loop_B, policy)
    assert ran[0, 5:7].min() < LOOPS
    np.testing.assert_array_equal(out.loops[:, 0], ran[0, 5:7])
    np.testing.assert_allclose(out.logits[:, 0], logits[0, 5:7], rtol=0, atol=1e-5)


def test_what_has_no_page_is_not_written():
    """Rows without pages, blocks without a page, and positions beyond the table; the others are written."""
    new = KV(jnp.ones((3, 2, 1, 2)), jnp.ones((3, 2, 1, 2)))
    pool = KV(*(jnp.zeros((2, PAGES, PAGE, 1, 2)) for _ in range(2)))
    cache = LayerCache(kv=pool, pages=jnp.array([[NONE, NONE], [3, NONE], [NONE, 1]]))
    index_BT = jnp.array([[0, 5], [3, 4], [7, 8]])
    loop_B = jnp.array([0, 1, 0])
    cache, seen = jax.jit(partial(update_cache, index_BT=index_BT, frozen_BT=None))(cache, new, loop=loop_B)
    for kv, read in zip(cache.kv, seen, strict=True):
        assert [tuple(at) for at in np.argwhere(np.asarray(kv)[..., 0, 0])] == [(0, 1, 3), (1, 3, 3)]
        assert [tuple(at) for at in np.argwhere(np.asarray(read)[..., 0, 0])] == [(1, 3), (2, 7)]
        assert np.isfinite(read).all()


@pytest.mark.parametrize(("config", "repeat"), [(MLA, False), (GQA_LAST, True)], ids=["mla_step", "gqa_while_loop"])
def test_nothing_of_the_pools_size_is_copied(config, repeat):
    """A step of rows at different loops, begin and finish in it, alone and in a loop of the device."""
    rows, pages, page = 3, 3001, 16

    def one(pool, table, length_B, token_B, loop_B, policy):
        def forward(model):
            tokens, cache = model.begin(token_B[:, None], cache=pool.at(table, length_B))
            tokens, cache, _ = model.loop(tokens, cache, loops=LOOPS, halting=policy, start=loop_B, count=1)
            out = model.finish(tokens, cache)
            return out.cache.pool(), out.logits[:, 0].argmax(-1).astype(jnp.int32)

        return apply(config, forward)

    def many(pool, table, length_B, token_B, *rest):
        first = pool, token_B
        return jax.lax.while_loop(lambda c: c[1].any(), lambda c: one(c[0], table, length_B, c[1], *rest), first)

    pool = jax.eval_shape(lambda: init_paged_cache(config, pages, page, LOOPS))
    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    table = jax.ShapeDtypeStruct((rows, 4), jnp.int32)
    program = jax.jit(many if repeat else one, donate_argnums=0)
    compiled = program.lower(pool, table, numbers, numbers, numbers, halting("latent", 0.1)).compile()
    sizes = compiled.memory_analysis()
    one_slot = pool.prelude[0].kv.keys
    assert sizes.alias_size_in_bytes >= sum(leaf.size * 4 for leaf in jax.tree.leaves(pool))  # donated
    assert sizes.temp_size_in_bytes < one_slot.size * 4 / 2
    text = compiled.as_text()
    for layer in (pool.prelude[0], pool.loop[0]):
        shape = "f32[" + ",".join(map(str, layer.kv.keys.shape)) + "]"
        assert not [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line]


def test_a_pool_is_divided_by_heads_only():
    with use_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2))):
        keys = init_paged_cache(GQA, 8, 4).loop[0].kv.keys
        assert keys.sharding.shard_shape(keys.shape) == (GQA.loops, 8, 4, 1, 8)
        latents = init_paged_cache(MLA, 8, 4).loop[0].kv.keys
        assert latents.sharding.is_fully_replicated


def test_rows_of_a_mesh_use_any_page():
    """Rows are divided over devices, pages are not: what each writes and sees is as without a mesh."""
    table = jnp.array([[5, 2], [0, 6], [0, 6], [NONE, 1]])
    new = KV(*(jnp.arange(float(x), x + 16).reshape(4, 1, 2, 2) for x in (1, 101)))
    rows = {"loop": jnp.array([0, 2, 1, 1]), "index_BT": jnp.array([[3], [6], [5], [7]])}

    def go(pool):
        cache = pool.at(table, jnp.zeros(4, jnp.int32)).loop[0]
        cache, seen = update_cache(cache, new, frozen_BT=None, **rows)
        return cache.kv, seen

    config = replace(GQA, n_heads=16)  # heads of width 2
    expected = jax.jit(go)(init_paged_cache(config, PAGES, PAGE))
    with use_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        pool = init_paged_cache(config, PAGES, PAGE)
        kv, seen = jax.jit(go)(pool)
    assert kv.keys.sharding == pool.loop[0].kv.keys.sharding
    jax.tree.map(np.testing.assert_array_equal, (kv, seen), expected)
    assert np.count_nonzero(expected[0].keys) == 4 * 2 * 2
