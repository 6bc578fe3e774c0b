"""The last line of a run's log as OpenMetrics, for Prometheus and whatever else reads its format."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from mythos_jax.errors import ConfigError
from mythos_jax.processes import log0
from mythos_jax.version import __version__

# What is known of the values of a log line; others are exported without a word.
_MEANINGS = {
    "loss": "cross-entropy, in nats per token",
    "held_out_loss": "cross-entropy on held-out rows, in nats per token",
    "mean_loops": "loops per token",
    "tokens_per_second": "rate since the line before, without evaluating and saving",
    "flops_per_second": "model FLOPs per second since the line before",
    "mfu": "model FLOPs, as a fraction of the devices' peak",
    "goodput": "fraction of the time since this start that was spent on steps",
    "data_wait": "seconds per step that the loop waited for its batch",
    "step_seconds_p50": "median duration of a step since the line before",
    "hbm_bytes": "memory in use, of the fullest local device",
    "expert_load": "fraction of a layer's choices that an expert gets",
}


class Exporter(Collector):
    """A logger that remembers the last value of everything, and tells it when it is asked."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._values: dict[str, Any] = {}

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        # A new dict, because another thread reads the old one.
        self._values = {**self._values, "step": step, "line_timestamp_seconds": time.time(), **metrics}

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def collect(self) -> Iterator[Any]:
        yield InfoMetricFamily("mythos_train", "the run", {"run": self._run, "version": __version__})
        for name, value in self._values.items():
            labels = ["run", "layer", "expert"] if isinstance(value, list) else ["run"]
            family = GaugeMetricFamily(f"mythos_train_{name}", _MEANINGS.get(name, name), labels=labels)
            for place, number in _numbers(value):
                family.add_metric([self._run, *place], number)
            yield family


def _numbers(value: Any) -> Iterator[tuple[list[str], float]]:
    """A number, or those of every expert in every layer, with their places."""
    if not isinstance(value, list):
        yield [], value
        return
    for layer, shares in enumerate(value):
        for expert, share in enumerate(shares):
            yield [str(layer), str(expert)], share


@contextlib.contextmanager
def exported(run: str, host: str, port: int) -> Iterator[Exporter]:
    """Listens at an address for as long as the context lasts. port: 0 for a free one. Raises ConfigError if that cannot
    be had."""
    exporter, registry = Exporter(run), CollectorRegistry()
    registry.register(exporter)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--metrics-host {host} --metrics-port {port}: cannot listen there ({reason})") from None
    address = f"[{host}]" if ":" in host else host
    log0(f"metrics: http://{address}:{server.server_port}/metrics")
    try:
        yield exporter
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
