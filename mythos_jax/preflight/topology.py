"""TPU slices to compile for: which slice shapes exist, and their names."""

from dataclasses import dataclass

from mythos_jax.chips import CHIPS, Chip
from mythos_jax.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """One or more slices of the same shape, joined by the data centre network."""

    chip: Chip
    shape: str
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}" + (f" x {self.slices}" if self.slices > 1 else "")


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The Topology of a name such as `v5e:16x16`. Raises ConfigError, which lists the known names, for another name."""
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or shape not in CHIPS[chip].shapes:
        candidates = [c for c in CHIPS.values() if c.name == chip] or list(CHIPS.values())
        names = "; ".join(f"{c.name}:" + f", {c.name}:".join(c.shapes) for c in candidates)
        raise ConfigError(f"--topology: got {name!r}, allowed: {names}")
    if slices < 1:
        raise ConfigError(f"--slices: got {slices}, allowed: an integer >= 1")
    return Topology(CHIPS[chip], shape, slices)
