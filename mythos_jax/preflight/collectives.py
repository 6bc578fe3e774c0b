"""Which collectives a compiled program runs, over which mesh axes, and how many bytes each chip sends."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Array, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_MEGASCALE_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    axes: mesh axes that its groups span. group: devices per group. arrays: what a chip contributes. runs: how often it
    runs per step. ici, dcn: bytes that a chip sends in all those runs, inside a slice and between slices.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    arrays: tuple[Array, ...]
    runs: float
    ici: float
    dcn: float
    op_name: str


def read_collectives(module: Module, mesh: Mesh) -> list[Collective]:
    """Every collective that runs, in the order of the program text."""
    collectives: list[Collective] = []
    seen_chains: set[str] = set()
    for instruction, runs in module.walk():
        kind = instruction.opcode.removesuffix("-start")
        transfer = _MEGASCALE_TRANSFER.search(instruction.attributes) if kind == "send" else None
        if transfer:
            collectives.append(_between_slices(instruction, transfer.group(1), runs, mesh))
            continue
        if kind not in KINDS:
            continue
        # When the TPU compiler fuses a collective with other work, it prints it once for each piece of that work. All
        # these have the same chain.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            if chain.group(1) in seen_chains:
                continue
            seen_chains.add(chain.group(1))
        # The TPU compiler prints a reduce-scatter as an all-reduce in a computation of this name.
        if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        collectives.append(_collective(module, instruction, kind, runs, mesh))
    return collectives


def _collective(module: Module, instruction: Instruction, kind: str, runs: float, mesh: Mesh) -> Collective:
    arrays = tuple(a for i in range(len(instruction.operands)) for a in module.operand(instruction, i).arrays)
    group = max(replica_groups(instruction, mesh.size), key=len)
    slices = len({slice_of(mesh.devices.flat[i]) for i in group})
    size = sum(array.bytes for array in arrays)
    if kind == "ragged-all-to-all":
        # Its operands are the rows to send, a buffer to receive into, and four lists of sizes. How many rows are sent
        # is known only at run time. Under an even load one of the first two is full; the other is for the worst case.
        size = min(array.bytes for array in arrays[:2])
    ici, dcn = bytes_sent(kind, size, len(group), slices)
    axes = spanned_axes(mesh, group)
    return Collective(kind, axes, len(group), arrays, runs, ici * runs, dcn * runs, instruction.op_name)


def _between_slices(instruction: Instruction, transfer: str, runs: float, mesh: Mesh) -> Collective:
    """A collective between slices, which the compiler hands to the hosts (megascale); it runs along the data axis."""
    kind = transfer.lower().replace("_", "-")
    slices = len({slice_of(device) for device in mesh.devices.flat})
    array = instruction.arrays[0]
    # Any other kind of transfer goes from one slice to one other, as in a permutation.
    _, dcn = bytes_sent(kind if kind in KINDS else "collective-permute", array.bytes, slices, slices)
    return Collective(kind, ("data",), slices, (array,), runs, 0.0, dcn * runs, instruction.op_name)


def bytes_sent(kind: str, size: int, n: int, slices: int = 1) -> tuple[float, float]:
    """Bytes that each chip sends (inside its slice, between slices) in a collective over a ring of n chips.

    size: bytes that each chip contributes. Over several slices, a gather or reduction first runs inside each slice, so
    that each chip sends 1 / (n / slices) of the data to the other slices.
    """
    if n == 1:
        return 0.0, 0.0
    if kind == "collective-permute":
        return (0.0, float(size)) if slices > 1 else (float(size), 0.0)
    per_slice = n // slices
    inside, between = (per_slice - 1) / per_slice, (slices - 1) / slices
    if kind in ("all-to-all", "ragged-all-to-all"):
        return size * (per_slice - 1) / n, size * between
    passes = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}[kind]
    total = size * n if kind == "all-gather" else size
    return passes * total * inside, passes * total * between / per_slice


def by_kind(collectives: Iterable[Collective]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """From (kind, mesh axes) to (runs per step, bytes per chip over ICI, bytes per chip over DCN), largest first."""
    totals: dict[tuple[str, str], tuple[float, float, float]] = {}
    for c in collectives:
        if c.group > 1:
            key = (c.kind, " x ".join(c.axes))
            count, ici, dcn = totals.get(key, (0.0, 0.0, 0.0))
            totals[key] = (count + c.runs, ici + c.ici, dcn + c.dcn)
    return dict(sorted(totals.items(), key=lambda item: -item[1][1] - item[1][2]))


def replica_groups(instruction: Instruction, n: int) -> list[list[int]]:
    """The groups of a collective, or the pairs of a permutation, as positions in the mesh.

    XLA has three notations for groups: lists, an iota that is reshaped and transposed, and axes of a mesh. Without any,
    all n devices are one group.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return [pair for pair in _lists(pairs.group(1)) if pair[0] != pair[1]] or [[0]]
    lists = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if lists:
        return _lists(lists.group(1))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims = _integers(iota.group(1)), _integers(iota.group(2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(3):
            ids = ids.transpose(_integers(iota.group(3)))
        return ids.reshape(shape).tolist()
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", text)
    if axes:
        return _mesh_groups(axes.group(1), axes.group(2), axes.group(3))
    return [list(range(n))]


def _mesh_groups(axes: str, order: str | None, spanned: str) -> list[list[int]]:
    """Groups in mesh notation, such as `mesh['a'=4,'b'=4] {'a'}`.

    A group may span a part of an axis: {'a':(2)2} is the part of size 2 that comes after a part of size 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        shape, _, permutation = order.partition("T(")
        ids = ids.reshape(_integers(shape.split("<=")[-1]))
        if permutation:
            ids = ids.transpose(_integers(permutation))
    # Reshape the mesh so that every part of an axis is a dimension of its own, and collect the spanned dimensions.
    dims: list[int] = []
    spanned_dims: list[int] = []
    spanned_parts = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", spanned)}
    for name, size in sizes.items():
        pre, length = spanned_parts.get(name, ("", ""))
        if pre:
            spanned_dims.append(len(dims) + 1)
            dims += [int(pre), int(length), size // (int(pre) * int(length))]
        else:
            if name in spanned_parts:
                spanned_dims.append(len(dims))
            dims.append(size)
    other_dims = [i for i in range(len(dims)) if i not in spanned_dims]
    group_size = math.prod(dims[i] for i in spanned_dims)
    return ids.reshape(dims).transpose([*other_dims, *spanned_dims]).reshape(-1, group_size).tolist()


def spanned_axes(mesh: Mesh, group: Sequence[int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    positions = np.stack(np.unravel_index(np.array(group), mesh.devices.shape))
    return tuple(name for name, row in zip(mesh.axis_names, positions, strict=True) if len(set(row.tolist())) > 1)


def slice_of(device: Any) -> int:
    """The index of the slice that a TPU is in, or of the node that a GPU is in."""
    return device.process_index if device.platform == "gpu" else getattr(device, "slice_index", None) or 0


def _integers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    return [_integers(part) for part in re.findall(r"\{?([\d,]+)\}?", text) if part.strip(",")]
