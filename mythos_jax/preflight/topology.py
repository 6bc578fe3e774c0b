"""TPU slices to compile for: which slice shapes there are, and the names that users give them."""

from dataclasses import dataclass

from mythos_jax.chips import CHIPS, Chip
from mythos_jax.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """`slices` slices of one shape, joined by the data centre network."""

    chip: Chip
    shape: str
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}" + (f" x {self.slices}" if self.slices > 1 else "")


def parse_topology(name: str, slices: int = 1) -> Topology:
    """`v5e:16x16` to a Topology; raises ConfigError, with those that are known, for another name."""
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or shape not in CHIPS[chip].shapes:
        known = [c for c in CHIPS.values() if c.name == chip] or CHIPS.values()
        listed = "; ".join(f"{c.name}:" + f", {c.name}:".join(c.shapes) for c in known)
        raise ConfigError(f"--topology: got {name!r}, allowed: {listed}")
    if slices < 1:
        raise ConfigError(f"--slices: got {slices}, allowed: an integer >= 1")
    return Topology(CHIPS[chip], shape, slices)
