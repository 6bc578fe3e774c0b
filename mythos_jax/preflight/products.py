"""FLOPs of the matrix products of HLO, a multiply-add counted as two."""

import math
import re

import numpy as np

from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Instruction, UnknownHloError


def dot_flops(module: Module, instruction: Instruction) -> float:
    """Of a plain product."""
    left = module.operand(instruction, 0).arrays[0].shape
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = math.prod(left[int(d)] for d in dims.group(1).split(",") if d) if dims else 1
    return 2.0 * math.prod(instruction.arrays[0].shape) * contracted


def narrow_kind(module: Module, instruction: Instruction) -> str | None:
    """The name in `model.products` of the 8-bit type that both operands of a product have; None if they are wider."""
    types = {module.operand(instruction, i).arrays[0].dtype for i in range(2)}
    if types == {"s8"}:
        return "int8"
    return "fp8" if all(name.startswith("f8") for name in types) else None


def convolution_flops(module: Module, instruction: Instruction) -> float:
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
