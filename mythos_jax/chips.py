"""What accelerator chips can do, as their makers publish it.

TPU numbers are per chip: https://docs.cloud.google.com/tpu/docs/v4, …/v5e, …/v5p, …/v6e and …/tpu7x (read in November
2026). Their inter-chip bandwidth counts both directions of all links; DCN of v5e and v6e is the pod's over 256 chips,
and that of v4, which is not published, v5p's.
GPU numbers are those of NVIDIA's data sheets (SXM modules; read in November 2026): FLOPs for dense matrices, which is
half of what they list "with sparsity", and NVLink in one direction, half of what they list. Between nodes each GPU has
a network adapter of its own, as in NVIDIA's DGX: 200 Gb/s with A100, 400 Gb/s with H100 and H200. Their memory is what
the driver reports.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import jax

from mythos_jax.errors import ConfigError

GB, MIB, GIB = 1e9, 2**20, 2**30


@dataclass(frozen=True)
class Chip:
    """A TPU or GPU to compile for, or one of the devices that a chip is for jax. hbm_bytes: what a program gets. flops:
    peak bfloat16 FLOP/s. narrow: the types of 8 bits, as in `model.products`, that it multiplies twice as fast.
    Bandwidths are in bytes per second. devices: of a chip."""

    name: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float  # TPU: of one torus axis, one link in each direction, as a ring uses them; GPU: NVLink
    dcn_bandwidth: float
    shapes: tuple[str, ...]  # slices that can be rented; GPUs of one node
    narrow: tuple[str, ...] = ("int8",)
    devices: int = 1
    is_gpu: bool = False

    @property
    def links(self) -> tuple[str, str]:
        """What carries data between its kind: inside a slice or a node, and between these."""
        return ("NVLink", "network") if self.is_gpu else ("ICI", "DCN")


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"
)  # fmt: skip

_NODE = ("1", "2", "4", "8")
# The part of its memory that jax lets a program have on a GPU, unless this variable says another.
_MEMORY_VARIABLE, _MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 15.75 * GIB, 197e12, 819 * GB, 400 / 4 * GB, 25 / 8 * GB, _FLAT),
        Chip("v6e", 31.25 * GIB, 918e12, 1600 * GB, 800 / 4 * GB, 100 / 8 * GB, _FLAT),
        Chip("v5p", 95.74 * GIB, 459e12, 2765 * GB, 1200 / 6 * GB, 50 / 8 * GB, (*_CUBES, "16x16x24")),
        Chip("v4", 30.75 * GIB, 275e12, 1200 * GB, 600 / 6 * GB, 50 / 8 * GB, _CUBES, narrow=()),
        Chip("a100", 81920 * MIB, 312e12, 2039 * GB, 300 * GB, 200 / 8 * GB, _NODE, is_gpu=True),
        Chip("h100", 81559 * MIB, 989e12, 3350 * GB, 450 * GB, 400 / 8 * GB, _NODE, ("int8", "fp8"), is_gpu=True),
        Chip("h200", 143771 * MIB, 989e12, 4800 * GB, 450 * GB, 400 / 8 * GB, _NODE, ("int8", "fp8"), is_gpu=True),
    )
}

# Peak bfloat16 FLOP/s of one jax device, by `device_kind`. A v4 or v5p chip has two cores and is one
# device; a TPU7x chip has two cores and is two devices.
_TPU_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": 2307e12 / 2,
}
# By prefix of `device_kind`, which may end in a memory size ("NVIDIA H100 80GB HBM3"). The first match counts, so the
# slower PCIe and NVL boards come before the SXM modules.
_GPU_FLOPS = (
    ("NVIDIA A100", CHIPS["a100"].flops),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", CHIPS["h100"].flops),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", CHIPS["h200"].flops),
)


def gpu_memory_fraction() -> float:
    """The part of a GPU's memory that jax lets a program have."""
    try:
        return float(os.environ.get(_MEMORY_VARIABLE, _MEMORY_FRACTION))
    except ValueError:
        got = os.environ[_MEMORY_VARIABLE]
        raise ConfigError(f"{_MEMORY_VARIABLE}: got {got!r}, allowed: a number from 0 to 1") from None


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """Peak bfloat16 FLOP/s of devices together; None if one is not in the tables, as a CPU or a part of a GPU."""
    peaks = [_peak_flops(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if len(known) == len(peaks) else None


def flops_of(kind: str) -> float:
    """Peak bfloat16 FLOP/s of a kind of device that is in the tables."""
    peak = _peak_flops(kind)
    assert peak is not None, f"{kind} is in no table"
    return peak


def _peak_flops(kind: str) -> float | None:
    if kind in _TPU_FLOPS:
        return _TPU_FLOPS[kind]
    if "MIG" in kind.split():  # one slice of the GPU that the rest of the name describes
        return None
    return next((flops for name, flops in _GPU_FLOPS if kind.startswith(name)), None)
