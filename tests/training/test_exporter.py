"""The newest line of a log as Prometheus reads it."""

import socket
from urllib.request import Request, urlopen

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from mythos_jax.errors import ConfigError
from mythos_jax.training.exporter import exported


def scraped(address):
    """(name, labels) -> value, by the parser of Prometheus's own client."""
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    with urlopen(Request(address, headers=accept)) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def test_the_newest_line_is_served(capsys):
    with exported("tiny", "127.0.0.1", 0) as exporter:
        address = capsys.readouterr().err.split()[-1]
        assert {name for name, *_ in scraped(address)} == {"mythos_train_info"}
        exporter.write(10, {"loss": 2.5, "held_out_loss": 2.75})
        exporter.write(20, {"loss": float("nan"), "expert_load": [[0.25, 0.75], [0.5, 0.5]]})
        found = scraped(address)
    run = ("run", "tiny")
    assert found["mythos_train_step", run] == 20
    assert found["mythos_train_held_out_loss", run] == 2.75
    assert str(found["mythos_train_loss", run]) == "nan"
    assert found["mythos_train_expert_load", ("expert", "1"), ("layer", "0"), run] == 0.75
    assert found["mythos_train_line_timestamp_seconds", run] > 1.7e9
    with pytest.raises(OSError, match="refused"):
        urlopen(address)


def test_an_address_that_cannot_be_had_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = f"--metrics-host 127.0.0.1 --metrics-port {port}: cannot listen there (Address already in use)"
        with pytest.raises(ConfigError) as error, exported("tiny", "127.0.0.1", port):
            pass
    assert str(error.value) == line
    with pytest.raises(ConfigError, match=r"--metrics-host no\.such\.host"), exported("tiny", "no.such.host", 0):
        pass
