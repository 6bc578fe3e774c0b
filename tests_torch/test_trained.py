"""A model trained by `mythos train`, exported to PyTorch."""

import json

import yaml
from open_mythos.main import MythosConfig

from mythos_jax.cli import main

EXPRESSIBLE = {  # a model that the original can express
    "vocab_size": 264, "dim": 48, "max_seq_len": 32, "loops": 3, "n_heads": 4, "n_kv_heads": 2, "rope_theta": 5e5,
    "hidden_dim": 64, "feed_forward": "moe", "n_experts": 4, "experts_per_token": 2, "expert_dim": 16,
    "n_shared_experts": 1, "shared_expert_dim": 32, "loop_embedding": True, "lora_rank": 4, "lora_loops": 3,
    "readout": "act", "act_remainder": False, "freeze_halted": False, "init_std": 0.02,
}  # fmt: skip


def train(tmp_path, **changes):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} has words and more words " * 4)
    data = {
        "path": str(tmp_path / "data"),
        "sources": [str(tmp_path / "text")],
        "seq_len": 16,
        "held_out_fraction": 0.2,
    }
    config = {
        "model": {**EXPRESSIBLE, **changes},
        "training": {"steps": 12, "batch_size": 8, "warmup_steps": 2, "learning_rate": 1e-2},
        "data": data,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), "--workdir", str(tmp_path / "run")]) == 0


def test_trained_model_in_the_original(tmp_path, capsys):
    train(tmp_path)
    capsys.readouterr()
    arguments = ["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "openmythos", "--check", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["check"]["ok"]
    assert max(report["check"]["max_abs_difference"].values()) <= 1e-4
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert MythosConfig(**{name: fields[name] for name in fields if name not in ("family", "tied")}).dim == 48


def test_inexpressible_features_are_named(tmp_path, capsys):
    train(tmp_path, act_remainder=True, state_norm=True)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "openmythos"]) == 2
    errors = capsys.readouterr().err
    assert "openmythos cannot express" in errors
    assert "model.act_remainder: true" in errors
    assert "model.state_norm: true" in errors
    assert not (tmp_path / "out").exists()
