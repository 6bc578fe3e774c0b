"""The config of a run that trains in seconds."""

import jax
import pytest

from mythos_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig

MODEL = ModelConfig(
    vocab_size=264,
    dim=32,
    max_seq_len=32,
    loops=2,
    n_heads=2,
    n_kv_heads=1,
    hidden_dim=48,
    feed_forward="moe",
    n_experts=4,
    experts_per_token=2,
    expert_dim=16,
    prelude_norm=True,
    state_norm=True,
)


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
        model=MODEL,
        training=TrainingConfig(steps=8, batch_size=8, checkpoint_every=3, log_every=1, warmup_steps=2),
        data=DataConfig(path=f"{text_file}_rows", sources=(str(text_file),), seq_len=16, held_out_fraction=0.2),
        evaluation=EvaluationConfig(batch_size=8),
        mesh=MeshConfig(),
    )
