"""The compiled programs of an engine: all of them are made before the first request, and none after."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mythos_jax.inference.sampling import Sampling
from mythos_jax.model.cache import init_paged_cache
from mythos_jax.serving.options import Layout, smallest
from mythos_jax.serving.places import EMPTY, Places, Setup, Terms, begin, new_work
from mythos_jax.serving.policy import NEVER, Policy
from mythos_jax.serving.prefill import Chunk, prefill
from mythos_jax.serving.readout import News
from mythos_jax.serving.request import MAX_STOP_TOKENS
from mythos_jax.serving.step import MAX_STEPS, steps
from mythos_jax.sharding import device_bytes, use_mesh

CALL_SECONDS = 0.004  # what a call of the device should take at least, so that starting it costs little
KIND, POSITION, TOKEN, LOOPS, ENDED, FINITE, RAN = range(7)  # the rows of a report's numbers


class Report(struct.PyTreeNode):
    """`News` packed for the host: one small array to wait for, and the log-probabilities, which are read if asked for.

    numbers: int32 [..., 7, K]: the rows KIND, POSITION, TOKEN, LOOPS, ENDED, FINITE, and RAN, which has the loops that
    were run in all its columns. Of steps, all arrays begin with MAX_STEPS.
    """

    numbers: jax.Array
    logprob_K: jax.Array
    top_KA: jax.Array
    top_logprob_KA: jax.Array


def pack(news: News) -> Report:
    some = news.sampled
    ran_K = jnp.broadcast_to(news.ran[..., None], news.kind_K.shape)
    numbers = news.kind_K, news.position_K, some.token_K, news.loops_K, news.ended_K, some.finite_K, ran_K
    packed = jnp.stack([x.astype(jnp.int32) for x in numbers], axis=-2)
    return Report(packed, some.logprob_K, some.top_KA, some.top_logprob_KA)


class Programs:
    """The state of the places on the device, and the programs that change it: `steps` and `prefill` in a few sizes."""

    def __init__(self, setup: Setup, layout: Layout, mesh: Mesh, loop_cache: str):
        self._setup, self._layout, self._mesh = setup, layout, mesh
        with use_mesh(mesh):
            self._places = _empty_places(setup, layout, mesh, loop_cache)
        self._compiled: dict[tuple[str, int, int], Any] = {}
        self.pace: dict[int, int] = {}  # steps of a call, for each bucket of places

    @property
    def count(self) -> int:
        return len(self._compiled)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of a device: the weights, the cache of keys and values, and what the largest program needs beside."""
        beside = [program.memory_analysis().temp_size_in_bytes for program in self._compiled.values()]
        kept = {"weights": self._setup.variables, "cache": self._places.pool}
        return {name: device_bytes(tree) for name, tree in kept.items()} | {"programs": max(beside, default=0)}

    def compile_all(self, progress: Callable[[str], None]) -> None:
        """Compiles every program; `progress` is told before each."""
        layout = self._layout
        wanted = [("steps", size, pages) for pages in layout.page_buckets for size in layout.place_buckets]
        wanted += [("prefill", size, pages) for pages in layout.page_buckets for size in layout.chunks]
        for i, key in enumerate(wanted):
            progress(f"{i} of {len(wanted)} programs")
            if key not in self._compiled:
                self._compiled[key] = self._compile(*key)
        for size in layout.place_buckets:
            step_seconds = self._time_step(size)
            self.pace[size] = max(1, min(MAX_STEPS, round(CALL_SECONDS / step_seconds)))

    def steps(self, at: np.ndarray, count: int, pages: int) -> Report:
        """`count` steps of the places at `at`, of a bucket's size; all their tokens are in the first `pages` pages."""
        program = self._compiled["steps", len(at), smallest(self._layout.page_buckets, pages)]
        self._places, report = program(self._setup.variables, self._places, (at, np.int32(count)))
        return report

    def prefill(self, chunk: Chunk) -> Report:
        """One chunk of a prompt, of one of the sizes."""
        pages = -(-(int(chunk.start) + len(chunk.tokens_C) + 1) // self._layout.page)
        pages = smallest(self._layout.page_buckets, min(pages, self._layout.row_pages))
        program = self._compiled["prefill", len(chunk.tokens_C), pages]
        self._places, report = program(self._setup.variables, self._places, chunk)
        return report

    def _time_step(self, size: int) -> float:
        """Seconds of a step of `size` places. One of them is at work, which costs as much as all of them."""
        layout, at = self._layout, np.full(size, self._layout.places, np.int32)
        at[0] = 0
        self.prefill(_chunk_of_one_token(layout, is_last=True))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self.steps(at, MAX_STEPS, layout.row_pages).numbers.block_until_ready()
            seconds.append(time.perf_counter() - start)
        self.prefill(_chunk_of_one_token(layout, is_last=False))  # the place is empty again
        return min(seconds) / MAX_STEPS

    def _compile(self, name: str, size: int, pages: int) -> Any:
        layout, whole, setup = self._layout, NamedSharding(self._mesh, PartitionSpec()), self._setup

        def run(variables: Any, places: Places, given: Any) -> tuple[Places, Report]:
            bound = setup.replace(variables=variables)
            if name == "steps":
                places, news = steps(bound, places, given[0], given[1], pages)
            else:
                places, news = prefill(bound, places, given, pages)
            return places, pack(news)

        nothing = np.full(size, layout.places, np.int32), np.int32(1)
        given = nothing if name == "steps" else no_chunk(layout, size)
        stays = jax.tree.map(lambda x: x.sharding, self._places)
        with use_mesh(self._mesh):
            job = jax.jit(run, donate_argnums=1, out_shardings=(stays, whole))
            program = job.lower(setup.variables, self._places, given).compile()
        # Run once for no request: the first run of a program takes longer than others.
        self._places, report = program(setup.variables, self._places, given)
        report.numbers.block_until_ready()
        return program


def no_terms(layout: Layout, count: int) -> Terms:
    """Terms of `count` places without a request, in NumPy: arrays of their own, to be filled in."""
    zeros, ones = np.zeros(count, np.int32), np.ones(count, np.int32)
    floats, index = np.zeros(count, np.float32), np.arange(count, dtype=np.int32)
    stops = np.full((count, MAX_STOP_TOKENS), -1, np.int32)
    pages = np.full((count, layout.row_pages), layout.pages, np.int32)
    policy, sampling = (ones, ones * NEVER, floats, ones), (floats, zeros, floats + 1, np.zeros(count, np.uint32))
    rest: Any = stops, zeros, zeros, index, index, pages, np.zeros(count, bool)
    terms = Terms(Policy(*cast(Any, policy)), Sampling(*cast(Any, sampling)), *rest)
    return jax.tree.map(np.copy, terms)


def no_chunk(layout: Layout, size: int) -> Chunk:
    """A chunk of no request."""
    ring_P, tokens_C = np.full(layout.places, layout.places, np.int32), np.zeros(size, np.int32)
    return Chunk(*cast(Any, (ring_P, no_terms(layout, 1), tokens_C, np.int32(1), np.int32(0), np.bool_(False))))


def _chunk_of_one_token(layout: Layout, is_last: bool) -> Chunk:
    """A request in place 0, without pages, that runs all loops of many tokens."""
    chunk = no_chunk(layout, layout.chunks[0])
    terms: Any = chunk.terms
    terms.policy.limit_B[:], terms.last_P[:] = layout.max_loops, layout.max_length
    ring_P: Any = np.array([0, *[layout.places] * (layout.places - 1)], np.int32)
    return chunk._replace(ring_P=ring_P, is_last=cast(Any, np.bool_(is_last)))


def _empty_places(setup: Setup, layout: Layout, mesh: Mesh, loop_cache: str) -> Places:
    c, whole = setup.model.config, NamedSharding(mesh, PartitionSpec())
    pool = init_paged_cache(c, layout.pages, layout.page, layout.max_loops, loop_cache)
    terms = no_terms(layout, layout.places)

    @partial(jax.jit, out_shardings=whole)
    def make(setup: Setup, terms: Terms, pool: Any) -> Any:
        count = layout.places
        cache = pool.at(terms.pages_PN, jnp.zeros(count, jnp.int32))
        active = jnp.zeros((count, 1), bool)
        tokens, _ = begin(setup, terms.sampling, jnp.zeros((count, 1), jnp.int32), active, cache)
        work = new_work(setup, terms.policy, tokens, jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))
        return work.replace(phase_P=jnp.full_like(work.phase_P, EMPTY))

    return Places(jax.device_put(terms, whole), make(setup, terms, pool), pool)
