"""Logs, configs and prepared data under gs://, with an object store in memory."""

import json

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from mythos_jax.config import Config, load_config, save_config
from mythos_jax.data.fetch import local_folder
from mythos_jax.data.prepare import prepare
from mythos_jax.errors import ConfigError
from mythos_jax.paths import copy_tree, is_remote, to_path
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


def test_prepared_rows_in_a_bucket_are_copied_once(tmp_path, monkeypatch, store):
    monkeypatch.setenv("MYTHOS_DATA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for i in range(10):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} " * 20)
    manifest = prepare([str(tmp_path / "text")], tmp_path / "rows", seq_len=8, held_out_fraction=0.3, progress=False)
    copy_tree(tmp_path / "rows", to_path("gs://bucket/rows"))
    folder = local_folder("gs://bucket/rows")
    assert folder.parent == tmp_path / "cache"
    for file in (tmp_path / "rows").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert manifest.fingerprint in (folder / "manifest.json").read_text()
    del store.store["/bucket/rows/train.array_record"]  # it is not read again
    assert local_folder("gs://bucket/rows") == folder
    assert local_folder(tmp_path / "rows") == tmp_path / "rows"
    with pytest.raises(ConfigError, match="gs://bucket/other: nothing prepared there"):
        local_folder("gs://bucket/other")
    with pytest.raises(ConfigError, match="gs://bucket/new: rows are prepared on a disk"):
        prepare([str(tmp_path / "text")], "gs://bucket/new", seq_len=8, held_out_fraction=0.3, progress=False)
