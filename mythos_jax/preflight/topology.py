"""TPU slices to compile for: what a chip can do, and which slice shapes there are.

Numbers are per chip and as published: https://docs.cloud.google.com/tpu/docs/v5e, …/v6e and …/v5p (read in November
2026). Their inter-chip bandwidth counts both directions of all links; DCN of v5e and v6e is the pod's over 256 chips.
"""

from dataclasses import dataclass

from mythos_jax.errors import ConfigError

GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Chip:
    """hbm_bytes: what the compiler gives a program. flops: peak bfloat16. Bandwidths in bytes a second."""

    name: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float  # of one torus axis: a link each way, as a ring collective uses them
    dcn_bandwidth: float
    shapes: tuple[str, ...]  # slices that can be rented


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24"
)  # fmt: skip

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 15.75 * GIB, 197e12, 819 * GB, 400 / 4 * GB, 25 / 8 * GB, _FLAT),
        Chip("v6e", 31.25 * GIB, 918e12, 1600 * GB, 800 / 4 * GB, 100 / 8 * GB, _FLAT),
        Chip("v5p", 95.74 * GIB, 459e12, 2765 * GB, 1200 / 6 * GB, 50 / 8 * GB, _CUBES),
    )
}


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
