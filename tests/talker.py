"""A tiny model with everything that a conversation needs: a tokenizer with special tokens, and a chat template."""

import json
from pathlib import Path
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting.pretrained import save_pretrained
from tests import tiny, tokenizer_kinds

TEMPLATES = Path(__file__).parent / "golden" / "chat_templates"
CHATML = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8").replace("<|im_start|>", tokenizer_kinds.END)
CONFIG = ModelConfig(
    vocab_size=402,
    dim=32,
    max_seq_len=256,
    loops=2,
    prelude_layers=1,
    coda_layers=1,
    n_heads=2,
    n_kv_heads=1,
    hidden_dim=48,
)


def save(folder: Path, config: ModelConfig = CONFIG, **files: Any) -> Path:
    """A model's directory. files: what else it has, as JSON; by default a tokenizer_config.json with ChatML."""
    tokenizer = tokenizer_kinds.save("byte_level", folder.parent)
    save_pretrained(folder, config, tiny.variables(config), tokenizer=tokenizer)
    settings = {"eos_token": tokenizer_kinds.END, "chat_template": CHATML}
    for name, fields in ({"tokenizer_config": settings} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder
