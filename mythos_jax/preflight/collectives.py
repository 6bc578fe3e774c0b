"""Which collectives a compiled program runs, over which mesh axes, and how many bytes each chip sends."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from mythos_jax.preflight.hlo import Array, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclass(frozen=True)
class Collective:
    """One collective instruction. runs: times a step. ici, dcn: bytes a chip sends in all those runs, inside a slice
    and between slices. axes: mesh axes that its groups span."""

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
    found, chains = [], set()
    for instruction, runs in module.walk():
        kind = instruction.opcode.removesuffix("-start")
        if between := _BETWEEN_SLICES.search(instruction.attributes) if kind == "send" else None:
            found.append(_through_the_host(instruction, between[1], runs, mesh))
            continue
        if kind not in KINDS:
            continue
        # The TPU compiler writes a collective that other work is fused into once for each piece of that work.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain and chain[1] in chains:
            continue
        chains.add(chain and chain[1])
        # The TPU compiler writes a reduce-scatter as an all-reduce in a computation of this name.
        if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        arrays = tuple(a for i in range(len(instruction.operands)) for a in module.operand(instruction, i).arrays)
        groups = replica_groups(instruction, mesh.size)
        group = max(groups, key=len)
        slices = len({slice_of(mesh.devices.flat[i]) for i in group})
        size = sum(array.bytes for array in arrays)
        if kind == "ragged-all-to-all":
            # Its operands: rows to send, a buffer to receive into, four lists of sizes. How many rows go is known only
            # when it runs. One of the two is full when the load is even, and the other has room for the worst case.
            size = min(array.bytes for array in arrays[:2])
        ici, dcn = bytes_sent(kind, size, len(group), slices)
        found.append(
            Collective(
                kind, spanned_axes(mesh, group), len(group), arrays, runs, ici * runs, dcn * runs, instruction.op_name
            )
        )
    return found


def _through_the_host(instruction: Instruction, transfer: str, runs: float, mesh: Mesh) -> Collective:
    """A collective between slices, which the compiler hands to the hosts: their parts of the data axis exchange it."""
    kind = transfer.lower().replace("_", "-")
    slices = len({slice_of(device) for device in mesh.devices.flat})
    array = instruction.arrays[0]
    _, dcn = bytes_sent(kind if kind in KINDS else "collective-permute", array.bytes, slices, slices)
    return Collective(kind, ("data",), slices, (array,), runs, 0.0, dcn * runs, instruction.op_name)


def bytes_sent(kind: str, size: int, n: int, slices: int = 1) -> tuple[float, float]:
    """Bytes each chip sends (inside a slice, between slices) when `size` bytes a chip go into a ring of n chips.

    Over several slices a gather or reduction runs inside each slice first, so that 1 / (n / slices) of it travels
    between them.
    """
    if n == 1:
        return 0.0, 0.0
    if kind == "collective-permute":
        return (0.0, float(size)) if slices > 1 else (float(size), 0.0)
    per_slice = n // slices
    inside, between = (per_slice - 1) / per_slice, (slices - 1) / slices
    if kind in ("all-to-all", "ragged-all-to-all"):
        return size * (per_slice - 1) / n, size * between
    times = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}[kind]
    whole = size * n if kind == "all-gather" else size
    return times * whole * inside, times * whole * between / per_slice


def replica_groups(instruction: Instruction, n: int) -> list[list[int]]:
    """Groups of positions in the mesh; a permute's pairs. All three spellings of XLA."""
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return [pair for pair in _lists(pairs.group(1)) if pair[0] != pair[1]] or [[0]]
    plain = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if plain:
        return _lists(plain.group(1))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = ([int(x) for x in part.split(",")] if part else None for part in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", text)
    if named:
        return _mesh_groups(*named.groups())
    return [list(range(n))]


def _mesh_groups(axes: str, order: str | None, spanned: str) -> list[list[int]]:
    """`mesh['a'=4,'b'=4] {'a'}`; an axis may be split: {'a':(2)2} is its part of size 2 after a part of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        dims, _, permutation = order.partition("T(")
        dims = [int(x) for x in re.findall(r"\d+", dims.split("<=")[-1])]
        ids = ids.reshape(dims)
        if permutation:
            ids = ids.transpose([int(x) for x in re.findall(r"\d+", permutation)])
    parts, chosen = [], []
    wanted = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", spanned)}
    for name, size in sizes.items():
        pre, length = wanted.get(name, ("", ""))
        if name in wanted and pre:
            chosen.append(len(parts) + 1)
            parts += [int(pre), int(length), size // (int(pre) * int(length))]
        else:
            if name in wanted:
                chosen.append(len(parts))
            parts.append(size)
    grid = ids.reshape(parts)
    rest = [i for i in range(len(parts)) if i not in chosen]
    return grid.transpose([*rest, *chosen]).reshape(-1, math.prod(parts[i] for i in chosen)).tolist()


def spanned_axes(mesh: Mesh, group: Sequence[int]) -> tuple[str, ...]:
    """Mesh axes along which a group's members differ."""
    positions = np.stack(np.unravel_index(np.array(group), mesh.devices.shape))
    return tuple(name for name, row in zip(mesh.axis_names, positions, strict=True) if len(set(row.tolist())) > 1)


def slice_of(device: object) -> int:
    return getattr(device, "slice_index", None) or 0


def _lists(text: str) -> list[list[int]]:
    return [[int(x) for x in part.split(",")] for part in re.findall(r"\{?([\d,]+)\}?", text) if part.strip(",")]
