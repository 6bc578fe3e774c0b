"""What a compiled program costs a chip: FLOPs of its matrix products, and bytes between HBM and core.

Only matrix products are counted as FLOPs; the rest is negligible in comparison. An opcode that is neither a product nor
in one of the sets below, or a kernel that does not report its cost, raises UnknownHloError: ignoring it could hide most
of a program's cost. The compiler also has custom calls of its own for small tasks, with names that change from version
to version. They count as free, and those not in FREE_CUSTOM_CALLS are listed as `uncounted`.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from mythos_jax.preflight.hlo import Instruction, Module, UnknownHloError
from mythos_jax.preflight.splash_cost import is_splash, splash_bytes, splash_flops

# Opcodes that move nothing themselves.
FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "iota",
    "partition-id", "replica-id", "after-all", "opt-barrier", "copy-done", "slice-done", "async-done",
    "collective-permute-done", "all-gather-done", "all-reduce-done", "async-update", "add-dependency", "domain",
    "get-dimension-size",
}  # fmt: skip
# Opcodes that read only as much of their first operand as they return.
PARTIAL_READS = {"dynamic-slice", "slice", "gather"}
# Opcodes that read their operands and write their result, and do little else.
STREAMED = PARTIAL_READS | {
    # elementwise
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan2", "atanh", "bitcast-convert", "cbrt", "ceil", "clamp",
    "compare", "complex", "convert", "cosh", "cosine", "count-leading-zeros", "divide", "erf", "exponential",
    "exponential-minus-one", "floor", "imag", "is-finite", "log", "log-plus-one", "logistic", "map", "maximum",
    "minimum", "multiply", "negate", "not", "or", "popcnt", "power", "real", "reduce-precision", "remainder",
    "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic",
    "shift-right-logical", "sign", "sine", "sinh", "sqrt", "stochastic-convert", "subtract", "tan", "tanh", "xor",
    # data movement
    "async-start", "broadcast", "concatenate", "copy", "dynamic-reshape", "dynamic-update-slice", "pad", "reshape",
    "reverse", "scatter", "select-and-scatter", "transpose",
    # reductions, sorting and random bits
    "reduce", "reduce-window", "rng", "rng-bit-generator", "rng-get-and-update-state", "sort", "topk",
    # a fusion's body is counted by itself
    "fusion",
    # communication
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "recv", "reduce-scatter",
    "send",
}  # fmt: skip
# An asynchronous operation is printed as `copy-start`, `copy-update` and `copy-done`.
_ASYNCHRONOUS = re.compile(r"-(start|update|done)$")
# The compiler's own custom calls, by target, that contain no matrix product; what they move is not counted.
FREE_CUSTOM_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "CreateBuffer", "DeviceId",
    "GatherScatterIndicesBitpacked", "LayoutConstraint", "MoveToDevice", "MoveToHost", "PadToStatic", "PartialReduce",
    "PinToDevice", "PrepareAsyncCallDone", "PrepareAsyncCallStart", "Sharding", "SliceId", "SliceToDynamic", "TopK",
    "TopKBatchMajorSmallK", "TopKWithUnique", "X64Combine", "X64SplitHigh", "X64SplitLow", "ZeroCrop",
    "annotate_device_placement",
}  # fmt: skip
# The target of Mosaic (Pallas) kernels.
_KERNEL = "tpu_custom_call"


@dataclass(frozen=True)
class Cost:
    """The cost of one execution, per chip. uncounted: custom calls that count as free but are not known to be."""

    flops: float
    hbm_bytes: float
    uncounted: tuple[str, ...] = ()


def cost(module: Module) -> Cost:
    """Sums over all instructions, each as often as it runs. Raises UnknownHloError if one has no known cost."""
    # Inside fusions and the functions of reductions, values never reach HBM.
    inside = {
        name
        for body in module.computations.values()
        for i in body
        for role, names in i.called().items()
        if (role == "calls" and i.opcode == "fusion") or role == "to_apply"
        for name in names
    }
    flops, moved, targets = 0.0, 0.0, set()
    for instruction, runs in module.walk():
        flops += runs * matmul_flops(module, instruction)
        if instruction.computation not in inside:
            moved += runs * hbm_bytes(module, instruction)
        if instruction.opcode == "custom-call":
            targets.add(_target(instruction))
    return Cost(flops, moved, tuple(sorted(targets - FREE_CUSTOM_CALLS - {_KERNEL})))


def matmul_flops(module: Module, instruction: Instruction) -> float:
    """FLOPs of a matrix product, a multiply-add counted as two, or those that a kernel reports; else 0.

    Raises UnknownHloError for an instruction whose cost is unknown.
    """
    opcode = instruction.opcode
    if opcode == "custom-call":
        return _custom_call_cost(module, instruction).flops
    if opcode == "dot":
        left = module.operand(instruction, 0).arrays[0].shape
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = math.prod(left[int(d)] for d in dims.group(1).split(",") if d) if dims else 1
        return 2.0 * math.prod(instruction.arrays[0].shape) * contracted
    if opcode == "convolution":
        return _convolution_flops(module, instruction)
    if not {opcode, _ASYNCHRONOUS.sub("", opcode)} & (FREE | STREAMED):
        raise UnknownHloError(f"opcode {opcode!r}", str(instruction))
    return 0.0


def _custom_call_cost(module: Module, instruction: Instruction) -> Cost:
    """What a kernel reports of itself. Splash attention reports nothing, so its cost is computed."""
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes)
    if estimate:
        numbers = dict(re.findall(r'"(\w+)":"?(\d+)', estimate.group(1)))
        return Cost(float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0)))
    if is_splash(instruction):
        return Cost(splash_flops(module, instruction), splash_bytes(module, instruction))
    if _target(instruction) == _KERNEL:
        raise UnknownHloError("cost of a kernel", str(instruction))
    return Cost(0.0, 0.0)


def _target(instruction: Instruction) -> str:
    """The target of a custom call."""
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    if not match:
        raise UnknownHloError("custom call without a target", str(instruction))
    return match.group(1)


def _convolution_flops(module: Module, instruction: Instruction) -> float:
    """The FLOPs of a convolution, counting only the taps that meet an element.

    On a TPU, batched matrix products become convolutions with a window most of whose taps fall on padding.
    """
    left, right = (module.operand(instruction, i).arrays[0].shape for i in range(2))
    out = instruction.arrays[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise UnknownHloError("convolution without dim_labels", str(instruction))
    lhs, rhs, result = labels.groups()
    window = _window(instruction.attributes)
    taps = 1.0
    for i in range(sum(label.isdigit() for label in result)):
        n_out, n_in = out[result.index(str(i))], left[lhs.index(str(i))]
        at = np.arange(n_out)[:, None] * window["stride"][i] - window["pad"][i]
        at = at + np.arange(window["size"][i])[None] * window["rhs_dilate"][i]
        dilate = window["lhs_dilate"][i]
        taps *= np.count_nonzero((at >= 0) & (at < (n_in - 1) * dilate + 1) & (at % dilate == 0))
    features = out[result.index("b")] * out[result.index("f")]
    return 2.0 * taps * features * right[rhs.index("i")]


def _window(attributes: str) -> dict[str, list[int]]:
    """A convolution's window by dimension: size, stride, lower padding, and dilations."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(item.split("=") for item in match.group(1).split() if "=" in item) if match else {}
    sizes = [int(x) for x in fields.get("size", "").split("x") if x]
    window = {"size": sizes, "pad": [0] * len(sizes)}
    for name in ("stride", "lhs_dilate", "rhs_dilate"):
        window[name] = [int(x) for x in fields[name].split("x")] if name in fields else [1] * len(sizes)
    if "pad" in fields:
        window["pad"] = [int(x.split("_")[0]) for x in fields["pad"].split("x")]
    return window


def hbm_bytes(module: Module, instruction: Instruction) -> float:
    """Bytes that an instruction outside fusions reads from HBM and writes to it."""
    if instruction.opcode in FREE:
        return 0.0
    if instruction.opcode == "custom-call":
        return _custom_call_cost(module, instruction).hbm_bytes
    if instruction.opcode.endswith("-start"):
        # A copy between HBM and the chip's fast memory, or a collective: it moves its result.
        return float(max((a.bytes for a in instruction.arrays), default=0))
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * module.operand(instruction, 1).bytes
    if instruction.opcode in PARTIAL_READS:
        return 2.0 * instruction.bytes
    body = module.computations.get((instruction.called().get("calls") or [""])[0], [])
    is_fusion = instruction.opcode == "fusion"
    total = 0.0
    for i in range(len(instruction.operands)):
        size = sum(a.bytes for a in module.operand(instruction, i).arrays if a.in_hbm)
        total += min(size, _bytes_read(body, i)) if is_fusion else size
    written = sum(a.bytes for a in instruction.arrays if a.in_hbm)
    return total + (min(written, _bytes_written(module, body)) if is_fusion and body else written)


def _bytes_read(body: list[Instruction], index: int) -> float:
    """Bytes of parameter `index` that a fusion reads; infinity (all of them) unless every use takes only a part."""
    name = next((i.name for i in body if i.opcode == "parameter" and i.operands == (str(index),)), None)
    uses = [i for i in body if name in i.operands]
    if uses and all(i.opcode in PARTIAL_READS or _updates(i, name) for i in uses):
        return float(sum(0 if i.opcode == "dynamic-update-slice" else i.bytes for i in uses))
    return math.inf


def _updates(instruction: Instruction, name: str | None) -> bool:
    return instruction.opcode == "dynamic-update-slice" and instruction.operands[0] == name


def _bytes_written(module: Module, body: list[Instruction]) -> float:
    """Bytes that a fusion writes; infinity (all of its result) unless it updates parts of buffers in place."""
    total, updated = 0.0, 0.0
    for i in body:
        if i.opcode == "dynamic-update-slice":
            total += module.operand(i, 1).bytes
            updated += i.bytes
    return total + max(0.0, body[-1].bytes - updated) if updated else math.inf
