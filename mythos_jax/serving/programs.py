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
from mythos_jax.serving.prefill import Chunk, admit, prefill
from mythos_jax.serving.readout import News
from mythos_jax.serving.request import MAX_STOP_TOKENS
from mythos_jax.serving.step import MAX_STEPS, steps
from mythos_jax.sharding import use_mesh


CALL_SECONDS = 0.004  # what a call of the device should take at least, so that starting it costs little


class Report(struct.PyTreeNode):
    """`News` packed for the host: one small array to wait for, and the log-probabilities, which are read if asked for.

    numbers: int32 [..., 7, K]: kind, position, token, loops, ended, finite, and in all of the last row the loops run.
    Of steps, all arrays begin with MAX_STEPS.
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
    """The state of the places on the device, and the three programs that change it, in the sizes of a layout."""

    def __init__(self, setup: Setup, layout: Layout, mesh: Mesh, loop_cache: str):
        self._setup, self._layout, self._mesh = setup, layout, mesh
        with use_mesh(mesh):
            self._places = _empty_places(setup, layout, mesh, loop_cache)
        self._compiled: dict[tuple[str, int, int], Any] = {}
        self.pace: dict[int, int] = {}  # steps of a call, for each bucket of places

    @property
    def count(self) -> int:
        return len(self._compiled)

    def compile_all(self, progress: Callable[[str], None]) -> None:
        """Compiles every program; `progress` is told before each."""
        layout = self._layout
        wanted: list[tuple[str, int, int]] = [("admit", 0, 0)]
        wanted += [("steps", size, pages) for pages in layout.page_buckets for size in layout.place_buckets]
        wanted += [("prefill", size, pages) for pages in layout.page_buckets for size in layout.chunks]
        for i, key in enumerate(wanted):
            progress(f"{i} of {len(wanted)} programs")
            if key not in self._compiled:
                self._compiled[key] = self._compile(*key)
                self._try(*key)
        for size in layout.place_buckets:
            step_seconds = self._time_step(size)
            self.pace[size] = max(1, min(MAX_STEPS, round(CALL_SECONDS / step_seconds)))

    def admit(self, at: list[int], terms: Terms) -> None:
        """The terms, [P] in each field, of the places of a new request."""
        at_P = _padded(at, self._layout.places, self._layout.places)
        self._places = self._compiled["admit", 0, 0](self._places, at_P, terms)

    def steps(self, at: np.ndarray, count: int, pages: int) -> Report:
        """`count` steps of the places at `at`, of a bucket's size; the tokens of all are within so many pages."""
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

    def _try(self, name: str, size: int, pages: int) -> None:
        """Runs a program on no request: its first run takes longer than others."""
        program, none = self._compiled[name, size, pages], self._layout.places
        if name == "admit":
            self.admit([], no_terms(self._layout, none))
        else:
            given = (np.full(size, none, np.int32), np.int32(1)) if name == "steps" else no_chunk(size)
            self._places, report = program(self._setup.variables, self._places, given)
            report.numbers.block_until_ready()

    def _time_step(self, size: int) -> float:
        """Seconds of a step of so many places. One of them is at work, which costs as much as all of them."""
        layout, at = self._layout, np.full(size, self._layout.places, np.int32)
        terms = jax.tree.map(np.copy, no_terms(layout, layout.places))
        terms.policy.limit_B[:1], terms.last_P[:1], at[0] = layout.max_loops, layout.max_length, 0
        self.admit([0], terms)
        chunk = no_chunk(layout.chunks[0])._replace(length=np.int32(1), is_last=np.bool_(True))
        self.prefill(chunk)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self.steps(at, MAX_STEPS, layout.row_pages).numbers.block_until_ready()
            seconds.append(time.perf_counter() - start)
        self.admit([0], no_terms(layout, layout.places))
        return min(seconds) / MAX_STEPS

    def _compile(self, name: str, size: int, pages: int) -> Any:
        layout, whole = self._layout, NamedSharding(self._mesh, PartitionSpec())
        stays = jax.tree.map(lambda x: x.sharding, self._places)
        with use_mesh(self._mesh):
            if name == "admit":
                job = jax.jit(admit, donate_argnums=0, out_shardings=stays)
                none = _padded([], layout.places, layout.places)
                return job.lower(self._places, none, no_terms(layout, layout.places)).compile()
            setup = self._setup

            def run(variables: Any, places: Places, given: Any) -> tuple[Places, Report]:
                bound = setup.replace(variables=variables)
                if name == "steps":
                    places, news = steps(bound, places, given[0], given[1], pages)
                else:
                    places, news = prefill(bound, places, given, pages)
                return places, pack(news)

            given = (np.zeros(size, np.int32), np.int32(0)) if name == "steps" else no_chunk(size)

            job = jax.jit(run, donate_argnums=1, out_shardings=(stays, whole))
            return job.lower(setup.variables, self._places, given).compile()


def no_terms(layout: Layout, count: int) -> Terms:
    """Terms of `count` places without a request, in NumPy."""
    zeros, ones = np.zeros(count, np.int32), np.ones(count, np.int32)
    floats, index = np.zeros(count, np.float32), np.arange(count, dtype=np.int32)
    stops = np.full((count, MAX_STOP_TOKENS), -1, np.int32)
    pages = np.full((count, layout.row_pages), layout.pages, np.int32)
    policy, sampling = (ones, ones * NEVER, floats, ones), (floats, zeros, floats + 1, np.zeros(count, np.uint32))
    rest: Any = stops, zeros, zeros, index, index, pages, np.zeros(count, bool)
    return Terms(Policy(*cast(Any, policy)), Sampling(*cast(Any, sampling)), *rest)


def no_chunk(size: int) -> Chunk:
    zero = np.int32(0)
    return Chunk(*cast(Any, (zero, np.zeros(size, np.int32), zero, zero, np.bool_(False))))


def _padded(at: list[int], count: int, none: int) -> np.ndarray:
    return np.array(at + [none] * (count - len(at)), np.int32)


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
