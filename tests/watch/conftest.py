"""A run directory made by hand."""

import json

import pytest

from mythos_jax.config import Config, DataConfig, TrainingConfig, save_config
from mythos_jax.paths import to_path


class RunDir:
    """Writes what a run would, at times that a test chooses."""

    def __init__(self, path, name="tiny", steps=100):
        self.path = to_path(path)
        self.path.mkdir(parents=True)
        training = TrainingConfig(steps=steps, batch_size=4, warmup_steps=0)
        save_config(Config(name=name, training=training, data=DataConfig(seq_len=32)), self.path / "config.yaml")

    def log(self, *rows):
        before = self.content("metrics.jsonl")
        (self.path / "metrics.jsonl").write_bytes(before + b"".join(json.dumps(r).encode() + b"\n" for r in rows))

    def event(self, event, time, **fields):
        line = json.dumps({"event": event, "time": time, **fields}).encode() + b"\n"
        (self.path / "events.jsonl").write_bytes(self.content("events.jsonl") + line)

    def content(self, name):
        path = self.path / name
        return path.read_bytes() if path.exists() else b""


@pytest.fixture
def make_run(tmp_path):
    return maker(tmp_path)


def maker(tmp_path):
    return lambda folder="run", **fields: RunDir(tmp_path / folder, **fields)
