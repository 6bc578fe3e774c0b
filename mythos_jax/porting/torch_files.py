"""PyTorch checkpoints (`.pt`, `.bin`, `.pth`, `.ckpt`), read without PyTorch and without executing anything in them.

`pickles.py` reads the opcodes, `torch_objects.py` knows what PyTorch's names stand for, `torch_archives.py` the two
containers, and `trainer_files.py` finds the weights and the config among what a trainer saves beside them.
"""

from pathlib import Path

import numpy as np

from mythos_jax.porting.tensor_info import TensorInfo
from mythos_jax.porting.torch_archives import open_archive
from mythos_jax.porting.torch_objects import StoredTensor
from mythos_jax.porting.trainer_files import find_configs, find_weights, unreadable


class TorchFile:
    """The tensors of one checkpoint by name. key: where they are in it, if it holds several models.

    configs: what was saved beside them and may be the model's config, with the name of its place. notes: lines that
    say what was chosen. Raises ConfigError: not a checkpoint, damaged, or without weights.
    """

    def __init__(self, path: str | Path, key: str | None = None):
        self.path = Path(path)
        self.notes: list[str] = []
        self._archive = open_archive(self.path)
        self.tensors: dict[str, TensorInfo] = find_weights(self.path, self._archive.value, self.notes, key)
        self.configs = find_configs(self._archive.value)

    def read(self, name: str) -> np.ndarray:
        """One tensor. Only its storage is held in memory."""
        tensor = self.tensors[name]
        if not isinstance(tensor, StoredTensor):
            raise unreadable(self.path, name, tensor)
        return self._archive.read(name, tensor)
