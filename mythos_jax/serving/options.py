"""How large an engine is: its options, and the sizes of places, pages and programs that follow from them."""

from dataclasses import dataclass

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.flops import cache_bytes
from mythos_jax.model.cache import loop_cache_for

PAGE = 16  # tokens of a page of the cache
DEFAULT_CACHE_BYTES = 2 << 30  # at most, where the options do not say
MIN_SEEN = 256  # tokens that attention looks at, at least, if there are as many; each four times as many are a program
CHUNKS = (16, 64, 256)  # tokens of a prompt that are read by one call; each is a program


@dataclass(frozen=True)
class EngineOptions:
    """places: tokens that loop at the same time. cache_bytes: of keys and values of all requests (default: room for all
    places at full length, at most 2 GiB). max_length: of prompt and answer, in tokens (default: the model's
    max_seq_len). max_loops: that a request may ask for (default: the model's loops). loop_cache: as in
    `model.cache.init_cache`. queue: requests that may wait. prefill_chunk: tokens of a prompt that are read between two
    steps, at most.
    """

    places: int = 32
    cache_bytes: int | None = None
    max_length: int | None = None
    max_loops: int | None = None
    loop_cache: str = "all"
    queue: int = 256
    prefill_chunk: int = CHUNKS[-1]


@dataclass(frozen=True)
class Layout:
    """The sizes of an engine.

    pages: of the pool, `page` tokens each; row_pages: of a request, at most. granularity: tokens of a prompt that were
    read for another request count in multiples of it. max_loops: of a request. place_buckets,
    page_buckets, chunks: the numbers of places, of pages seen by attention, and of tokens read by a call, for which
    there are programs; ascending.
    """

    places: int
    page: int
    pages: int
    row_pages: int
    granularity: int
    max_length: int
    max_loops: int
    place_buckets: tuple[int, ...]
    page_buckets: tuple[int, ...]
    chunks: tuple[int, ...]

    def loops(self, config: ModelConfig, asked: int | None) -> int:
        """The most loops of a token of a request: what it asks for, else the model's, as far as the engine goes."""
        return min(config.loops, self.max_loops) if asked is None else asked


def make_layout(config: ModelConfig, options: EngineOptions) -> Layout:
    """Raises ConfigError for options that cannot be."""
    limit = config.max_seq_len
    max_length = limit if options.max_length is None else options.max_length
    max_loops = config.loops if options.max_loops is None else options.max_loops
    _check(options.places >= 1, "places", options.places, "an integer >= 1")
    _check(2 <= max_length <= limit, "max_length", max_length, f"2 to max_seq_len, {limit}")
    _check(max_loops >= 1, "max_loops", max_loops, "an integer >= 1")
    _check(options.queue >= 0, "queue", options.queue, "an integer >= 0")
    _check(options.prefill_chunk >= 1, "prefill_chunk", options.prefill_chunk, "an integer >= 1")
    row_pages = -(-max_length // PAGE)
    page_bytes = PAGE * cache_bytes(config, max_loops, options.loop_cache)
    budget = options.cache_bytes
    if budget is None:
        budget = max(min(options.places * row_pages * page_bytes, DEFAULT_CACHE_BYTES), row_pages * page_bytes)
    pages = min(budget // page_bytes, options.places * row_pages)
    _check(
        pages >= row_pages,
        "cache_bytes",
        f"{budget:,}",
        f"at least {row_pages * page_bytes:,}, one request of max_length {max_length}",
    )
    largest = min(options.prefill_chunk, max_length)
    exact = loop_cache_for(config, options.loop_cache, max_loops) == "all"
    return Layout(
        places=options.places,
        page=PAGE,
        pages=pages,
        row_pages=row_pages,
        granularity=1 if exact else largest,
        max_length=max_length,
        max_loops=max_loops,
        place_buckets=_place_buckets(options.places),
        page_buckets=_page_buckets(row_pages),
        # Where loops share slots, the result depends on the cuts, which therefore are always the same.
        chunks=_chunks(largest) if exact else (largest,),
    )


def smallest(buckets: tuple[int, ...], count: int) -> int:
    """The smallest bucket that holds `count`."""
    return next(size for size in buckets if size >= count)


def chunk_size(chunks: tuple[int, ...], left: int) -> int:
    """The size of the next chunk of a prompt that has `left` tokens left: one that holds them
    all, if at most half of it is padding, else one that they fill."""
    filled = [size for size in chunks if size <= left]
    holds = next((size for size in chunks if size >= left), None)
    if holds is not None and (not filled or 2 * left >= holds):
        return holds
    return filled[-1]


def _place_buckets(places: int) -> tuple[int, ...]:
    """Halves down to 8 places, where one more row costs its share on a CPU; below, and of many places, quarters."""
    sizes = [places]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // (2 if 8 < sizes[-1] <= 64 else 4)))
    return tuple(sorted(sizes))


def _page_buckets(row_pages: int) -> tuple[int, ...]:
    """All pages of a row, a quarter of them, and so on, down to MIN_SEEN tokens."""
    sizes = [row_pages]
    while sizes[-1] * PAGE >= 2 * MIN_SEEN:
        sizes.append(max(-(-sizes[-1] // 4), MIN_SEEN // PAGE))
    return tuple(sorted(set(sizes)))


def _chunks(largest: int) -> tuple[int, ...]:
    return tuple(sorted({*(size for size in CHUNKS if size < largest), largest}))


def _check(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}: got {got}, allowed: {allowed}")
