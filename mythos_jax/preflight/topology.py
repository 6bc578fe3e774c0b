"""What to compile for, by name: slices of TPUs, and nodes of GPUs."""

import dataclasses
import math
import re
from dataclasses import dataclass

from mythos_jax.chips import CHIPS, Chip, gpu_memory_fraction
from mythos_jax.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """Slices of TPUs of one shape, joined by the data centre network, or nodes of GPUs, joined by a network."""

    chip: Chip
    shape: str
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}" + (f" x {self.slices}" if self.slices > 1 else "")

    @property
    def chips(self) -> int:
        """In all slices or nodes together."""
        return math.prod(map(int, self.shape.split("x"))) * self.slices

    @property
    def nodes(self) -> tuple[int, int]:
        """Of GPUs: the number of nodes, and of GPUs in each."""
        *nodes, gpus = self.shape.split("x")
        return int(nodes[0]) if nodes else 1, int(gpus)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The Topology of a name such as `v5e:16x16`, `h100:8` or, for two nodes of eight GPUs, `h100:2x8`.

    Raises ConfigError, which lists the known names, for another name.
    """
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or not _exists(CHIPS[chip], shape):
        candidates = [c for c in CHIPS.values() if c.name == chip] or list(CHIPS.values())
        raise ConfigError(f"--topology: got {name!r}, allowed: {'; '.join(map(_names, candidates))}")
    if slices < 1:
        raise ConfigError(f"--slices: got {slices}, allowed: an integer >= 1")
    if not CHIPS[chip].is_gpu:
        return Topology(CHIPS[chip], shape, slices)
    if slices > 1:
        raise ConfigError(f"--slices: got {slices}, allowed: 1 for GPUs, whose nodes are in the name: {chip}:2x8")
    memory = CHIPS[chip].hbm_bytes * gpu_memory_fraction()
    return Topology(dataclasses.replace(CHIPS[chip], hbm_bytes=memory), shape)


def _exists(chip: Chip, shape: str) -> bool:
    return shape in chip.shapes or (chip.is_gpu and re.fullmatch(r"[1-9]\d{0,3}x8", shape) is not None)


def _names(chip: Chip) -> str:
    names = f"{chip.name}:" + f", {chip.name}:".join(chip.shapes)
    return names + (f", {chip.name}:Nx8 for N nodes" if chip.is_gpu else "")
