"""Logs and configs under gs://, with an object store in memory (rows: tests/data/test_shards.py)."""

import json

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from mythos_jax.config import Config, load_config, save_config
from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote, to_path
from mythos_jax.training import loggers
from mythos_jax.training.loggers import RemoteJsonlLogger, open_jsonl, open_loggers


class Store(MemoryFileSystem):
    """Stores gs://bucket/x; as in a real object store, nothing can be appended to an object."""

    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def _open(self, path, mode="rb", **keywords):
        assert "a" not in mode
        return super()._open(path, mode, **keywords)


@pytest.fixture(autouse=True)
def store(monkeypatch):
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Store())
    return Store


def lines(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_log_in_a_bucket_is_complete_after_every_flush_and_truncated_on_resume(monkeypatch):
    run = to_path("gs://bucket/run")
    assert is_remote(run)
    log = open_jsonl(run, restored_step=0)
    assert isinstance(log, RemoteJsonlLogger)
    log.write(1, {"loss": 2.0})
    assert not (run / "metrics.jsonl").exists()
    log.flush()
    log.write(2, {"loss": 1.0})
    assert lines(run / "metrics.jsonl") == [1]
    monkeypatch.setattr(loggers, "COPY_EVERY", 0)
    log.write(3, {"loss": 1.0})
    assert lines(run / "metrics.jsonl") == [1, 2, 3]
    log.close()
    log = open_jsonl(run, restored_step=2)
    log.write(3, {"loss": 5.0})
    log.close()
    assert lines(run / "metrics.jsonl") == [1, 2, 3]
    assert '"loss": 5.0' in (run / "metrics.jsonl").read_text()


def test_tensorboard_files_in_a_bucket_are_complete_when_closed():
    run = to_path("gs://bucket/run")
    (first,) = open_loggers(("tensorboard",), run, "name", restored_step=0)
    first.write(1, {"loss": 2.0})
    first.close()
    (second,) = open_loggers(("tensorboard",), run, "name", restored_step=1)
    second.write(2, {"loss": 1.0})
    second.close()
    files = sorted((run / "tensorboard").iterdir(), key=lambda file: file.name)
    assert [b"loss" in file.read_bytes() for file in files] == [True, True]


def test_a_config_in_a_bucket():
    save_config(Config(name="there"), "gs://bucket/run/config.yaml")
    assert load_config("gs://bucket/run/config.yaml") == Config(name="there")
    with pytest.raises(ConfigError, match=r"gs://bucket/run/other\.yaml: cannot be read"):
        load_config("gs://bucket/run/other.yaml")
