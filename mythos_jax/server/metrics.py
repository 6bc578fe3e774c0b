"""/metrics: what Prometheus reads."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COUNTERS = {
    "steps": "steps of the engine, each one loop of all places in use",
    "loops": "loops that places have executed",
    "token_loops": "loops that new tokens have taken",
    "full_loops": "loops that would have been executed if no token had halted early",
    "tokens": "new tokens",
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts that were in the prefix cache",
    "drafted": "tokens shown before full depth",
    "accepted": "drafts that full depth has confirmed",
}
_GAUGES = {
    "places": "places for tokens",
    "occupied": "places in use",
    "queued": "requests that wait for a place",
    "pages": "pages of the cache",
    "pages_used": "pages of the cache in use",
    "compiled": "programs compiled",
}


class _Engine(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, engine: Any):
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        counters = self._engine.counters
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"mythos_{name}", text, value=getattr(counters, name))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"mythos_{name}", text, value=getattr(counters, name))
        saving = 1 - counters.token_loops / counters.full_loops if counters.full_loops else 0.0
        yield GaugeMetricFamily("mythos_halting_saving", "part of all loops that halting has saved", value=saving)


class Metrics:
    def __init__(self, engine: Any):
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(engine))
        self.first_token = self._seconds("time_to_first_token", "from a request to its first token")
        self.between_tokens = self._seconds("inter_token_latency", "between the tokens of a reply")
        self.duration = self._seconds("request_duration", "from a request to the end of its reply")
        self.requests = Counter(
            "mythos_requests", "requests by path and status", ["path", "status"], registry=self.registry
        )

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"mythos_{name}_seconds", text, buckets=_SECONDS, registry=self.registry)
