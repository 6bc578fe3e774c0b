"""The golden models, made with the PyTorch originals; the README in each folder says how."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.porting.pretrained import load_pretrained

FOLDER = Path(__file__).parents[1] / "golden"
OURS = ("openmythos_gqa", "openmythos_mla", "huginn", "parcae")  # made for recurrent depth from the start
DENSE = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "olmo2")  # written by transformers, without our fields
NAMES = (*OURS, "raven_llama", "raven_olmo", "nanbeige", "ouro", *DENSE)
FAMILY = {name: name.split("_")[0] for name in NAMES} | {"mistral": "llama", "raven_olmo": "raven_olmo"}


@cache
def load(name: str) -> tuple[ModelConfig, Any]:
    return load_pretrained(FOLDER / name)


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / "golden.npz") as file:
        return dict(file)


def fields(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "config.json").read_text())


def loop_counts(name: str) -> list[int]:
    """The depths that there are logits for; dense models have one."""
    return [int(loops) for loops in arrays(name).get("loop_counts", [1])]


def logits(name: str, loops: int) -> np.ndarray:
    return arrays(name)["logits" if name in DENSE else f"logits_r{loops}"]
