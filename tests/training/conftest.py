"""The config of a run that trains in seconds."""

import shutil
from pathlib import Path

import jax
import pytest

from mythos_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, TrainingConfig
from mythos_jax.training.train import train
from tests.tiny import TRAINED


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Trains on one device unless a test chooses otherwise; the eight simulated ones share the CPU's cores."""
    use_devices(monkeypatch, 1)


def use_devices(monkeypatch, count):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:count])


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A folder of small documents."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        words = " ".join(f"word{(i * 7 + j * j) % 23}" for j in range(60))
        (folder / f"{i:02}.txt").write_text(f"document {i}: {words}\n")
    return folder


@pytest.fixture
def config(text_file):
    return Config(
        name="tiny",
        model=TRAINED,
        training=TrainingConfig(steps=8, batch_size=8, checkpoint_every=3, log_every=1, warmup_steps=2),
        data=DataConfig(path=f"{text_file}_rows", sources=(str(text_file),), seq_len=16, held_out_fraction=0.2),
        evaluation=EvaluationConfig(batch_size=8),
        mesh=MeshConfig(),
    )


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def uninterrupted(config, tmp_path, trained_once):
    """The directory of a run that nothing interrupted: each test's own copy."""
    if not trained_once.exists():
        train(config, trained_once, progress=False)
    return Path(shutil.copytree(trained_once, tmp_path / "uninterrupted"))
