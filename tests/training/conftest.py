"""The configs of runs that train in seconds."""

import shutil
from pathlib import Path

import jax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mythos_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig, save_config
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


MODEL = ModelConfig(
    vocab_size=264,
    dim=16,
    max_seq_len=32,
    prelude_layers=0,
    coda_layers=0,
    loops=2,
    n_heads=2,
    n_kv_heads=2,
    hidden_dim=16,
)


def write_tokenizer(file, size, texts):
    """A byte-level BPE as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.save(str(file))


@pytest.fixture(scope="session")
def home(tmp_path_factory, text_file):
    """A folder with text, two tokenizers, a config, and a run of it on two devices."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(text_file, folder / "text")
    texts = [file.read_text() for file in sorted((folder / "text").iterdir())]
    write_tokenizer(folder / "own.json", 264, texts)
    write_tokenizer(folder / "other.json", 260, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_devices(patch, 2)
        save_config(config_of(), "c.yaml")
        train(config_of(), "run", progress=False)
    return folder


def config_of(tokenizer="own.json", **data):
    """Of a tiny run on text. Neither of its batch sizes divides over three devices or over eight."""
    return Config(
        name="c",
        model=MODEL,
        training=TrainingConfig(steps=2, batch_size=4, checkpoint_every=2, warmup_steps=1, evaluate_every=2),
        data=DataConfig(sources=("text",), tokenizer=tokenizer, seq_len=16, held_out_fraction=0.2, **data),
        evaluation=EvaluationConfig(batch_size=5, max_rows=12, loops=(2,)),
        mesh=MeshConfig(data=2, fsdp=1),
    )
