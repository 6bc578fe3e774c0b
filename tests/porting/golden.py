"""The golden models, made with the PyTorch originals; the README in each folder says how."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.porting.pretrained import load_pretrained

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = ("openmythos_gqa", "openmythos_mla", "huginn", "parcae")
FAMILY = {name: name.split("_")[0] for name in NAMES}


@cache
def load(name: str) -> tuple[ModelConfig, Any]:
    return load_pretrained(FOLDER / name)


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / "golden.npz") as file:
        return dict(file)


def fields(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "config.json").read_text())
