"""Writes tests/golden/checkpoints: small files that `make test` reads without torch. Run it with torch 2.13:

.venv-torch/bin/python tests_torch/make_checkpoints.py
"""

import argparse
import collections
import datetime
import enum
import functools
import pathlib
import random
import shutil
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from mythos_jax.porting.torch_objects import DTYPES as TO_NUMPY

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "checkpoints"
DTYPES = [*TO_NUMPY, "complex32"]


class Kind(enum.Enum):
    A = 1


@dataclass
class MythosConfig:
    """As a training script defines it: its module is `__main__`."""

    dim: int = 24
    kind: Kind = Kind.A
    where: pathlib.PurePosixPath | None = None


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList([torch.nn.Linear(3, 2, bias=False)])
        self.inner[0].weight.data = weight()
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("left", torch.ones(2), persistent=False)


def weight() -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3)


def dtypes() -> dict[str, torch.Tensor]:
    """Of each dtype, the transpose of every second column of a matrix."""
    return {name: (1 + torch.arange(24).reshape(4, 6) % 2).to(getattr(torch, name))[1:, ::2].T for name in DTYPES}


def beside() -> dict[str, object]:
    """What may stand beside the weights."""
    ones = torch.ones(2)
    return {
        "plain": [torch.float32, torch.device("cpu"), torch.Size([1]), {1}, b"\xff", bytearray(b"x"), 1j, frozenset()],
        "containers": [collections.Counter("aab"), collections.defaultdict(list, a=[1]), collections.deque([1])],
        "tensors": [torch.nn.Buffer(ones), ones.to_sparse(), ones.to("meta"), torch.ones(2).untyped_storage()],
        "quantized": torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
        "random": [
            random.Random(0).getstate()[1][:3],
            np.random.RandomState(0).get_state()[0],
            np.float64(1),
            np.arange(2),
        ],
        "objects": [Kind.A, datetime.date(2020, 1, 1), pathlib.PurePosixPath("a"), functools.partial(print, 1), len],
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("out")),
        "cfg": MythosConfig(where=pathlib.PurePosixPath("/a/b")),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(ones)]),
    }


def main() -> None:
    shutil.rmtree(FOLDER / "dcp", ignore_errors=True)
    state = {"model": {"w.weight": torch.nn.Parameter(weight()), "w.bias": torch.ones(2, dtype=torch.bfloat16)}}
    torch.save(dtypes(), FOLDER / "dtypes.pt")
    for protocol in (2, 5):
        torch.save(state | beside(), FOLDER / f"beside_{protocol}.pt", pickle_protocol=protocol)
    torch.save(Module(), FOLDER / "module.pt")
    torch.save(state, FOLDER / "old.pt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    torch.save(state, FOLDER / "no_checksums.pt")
    dcp.save(state | {"cfg": {"dim": 24}, "optim": {"m": torch.ones(2)}}, checkpoint_id=FOLDER / "dcp")


if __name__ == "__main__":
    main()
