"""What a compiled program costs a chip: FLOPs of its matrix products, and bytes between HBM and core."""

import math
import re
from dataclasses import dataclass

import numpy as np

from mythos_jax.preflight.hlo import Instruction, Module
from mythos_jax.preflight.splash_cost import splash_bytes, splash_flops

# Instructions that move nothing themselves.
_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "iota",
    "partition-id", "replica-id", "after-all", "opt-barrier", "copy-done", "slice-done", "async-done",
    "collective-permute-done", "all-gather-done", "all-reduce-done", "async-update",
}  # fmt: skip
_READS_A_PART = {"dynamic-slice", "slice", "gather"}


@dataclass(frozen=True)
class Cost:
    """Per chip and execution."""

    flops: float
    hbm_bytes: float


def cost(module: Module) -> Cost:
    """Sums over all instructions, each times how often it runs."""
    inside = {
        name
        for body in module.computations.values()
        for i in body
        for role, names in i.called().items()
        if (role == "calls" and i.opcode == "fusion") or role == "to_apply"
        for name in names
    }
    flops, moved = 0.0, 0.0
    for instruction, runs in module.walk():
        flops += runs * matmul_flops(module, instruction)
        if instruction.computation not in inside:
            moved += runs * hbm_bytes(module, instruction)
    return Cost(flops, moved)


def matmul_flops(module: Module, instruction: Instruction) -> float:
    """FLOPs of a product, a multiply-add as two; a kernel's are what it says of itself. 0 for the rest."""
    if instruction.opcode == "custom-call":
        told = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
        return float(told.group(1)) if told else splash_flops(module, instruction)
    if instruction.opcode == "dot":
        left = module.operand(instruction, 0).arrays[0].shape
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        summed = math.prod(left[int(d)] for d in dims.group(1).split(",") if d) if dims else 1
        return 2.0 * math.prod(instruction.arrays[0].shape) * summed
    return _convolution_flops(module, instruction) if instruction.opcode == "convolution" else 0.0


def _convolution_flops(module: Module, instruction: Instruction) -> float:
    """Batched products are convolutions on a TPU, with windows of which only some taps meet an element."""
    left, right = (module.operand(instruction, i).arrays[0].shape for i in range(2))
    out = instruction.arrays[0].shape
    lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = _window(instruction.attributes)
    taps = 1.0
    for i in range(sum(label.isdigit() for label in result)):
        o, d = out[result.index(str(i))], left[lhs.index(str(i))]
        at = np.arange(o)[:, None] * window["stride"][i] - window["pad"][i]
        at = at + np.arange(window["size"][i])[None] * window["rhs_dilate"][i]
        dilate = window["lhs_dilate"][i]
        taps *= np.count_nonzero((at >= 0) & (at < (d - 1) * dilate + 1) & (at % dilate == 0))
    features = out[result.index("b")] * out[result.index("f")]
    return 2.0 * taps * features * right[rhs.index("i")]


def _window(attributes: str) -> dict[str, list[int]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(item.split("=") for item in found.group(1).split() if "=" in item) if found else {}
    sizes = [int(x) for x in fields.get("size", "").split("x") if x]
    window = {"size": sizes, "pad": [0] * len(sizes)}
    for name in ("stride", "lhs_dilate", "rhs_dilate"):
        window[name] = [int(x) for x in fields[name].split("x")] if name in fields else [1] * len(sizes)
    if "pad" in fields:
        window["pad"] = [int(x.split("_")[0]) for x in fields["pad"].split("x")]
    return window


def hbm_bytes(module: Module, instruction: Instruction) -> float:
    """Bytes that an instruction outside of fusions reads from HBM and writes to it; parts count as parts."""
    if instruction.opcode in _FREE:
        return 0.0
    told = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"?(\d+)', instruction.attributes)
    if instruction.opcode == "custom-call":
        return float(told.group(1)) if told else splash_bytes(module, instruction)
    if instruction.opcode.endswith("-start"):
        # A copy between HBM and the chip's fast memory, or a collective: what it moves is its result.
        return float(max((a.bytes for a in instruction.arrays), default=0))
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * module.operand(instruction, 1).bytes
    if instruction.opcode in _READS_A_PART:
        return 2.0 * instruction.bytes
    body = module.computations.get((instruction.called().get("calls") or [""])[0], [])
    written = _written(module, body) if instruction.opcode == "fusion" and body else None
    total = 0.0
    for i in range(len(instruction.operands)):
        operand = module.operand(instruction, i)
        whole = sum(a.bytes for a in operand.arrays if a.in_hbm)
        total += min(whole, _read(body, i)) if instruction.opcode == "fusion" else whole
    out = sum(a.bytes for a in instruction.arrays if a.in_hbm)
    return total + (out if written is None else min(out, written))


def _read(body: list[Instruction], index: int) -> float:
    """Bytes of parameter `index` that a fusion looks at: all, unless each use takes a part or only updates it."""
    name = next((i.name for i in body if i.opcode == "parameter" and i.operands == (str(index),)), None)
    uses = [i for i in body if name in i.operands]
    if uses and all(i.opcode in _READS_A_PART or _updates(i, name) for i in uses):
        return float(sum(0 if i.opcode == "dynamic-update-slice" else i.bytes for i in uses))
    return math.inf


def _updates(instruction: Instruction, name: str | None) -> bool:
    return instruction.opcode == "dynamic-update-slice" and instruction.operands[0] == name


def _written(module: Module, body: list[Instruction]) -> float:
    """Bytes a fusion writes: all of its result, of buffers updated in place the update alone."""
    total, updated = 0.0, 0.0
    for i in body:
        if i.opcode == "dynamic-update-slice":
            total += module.operand(i, 1).bytes
            updated += i.bytes
    return total + max(0.0, body[-1].bytes - updated) if updated else math.inf
