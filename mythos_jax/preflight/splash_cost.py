"""The cost of splash attention (ops/splash_attention.py) per chip: unlike other kernels, it does not report its own."""

import math
import re

from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Array, Instruction

# The widths of the matrix products of each pass over a block: forward, scores and weighted values; backward, the
# scores again and the gradients.
_PRODUCTS = {"fwd": ("K", "V"), "dq": ("K", "V", "K"), "dkv": ("K", "V", "K", "V")}
_NAME = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


def is_splash(instruction: Instruction) -> bool:
    """Whether a custom call is one of the kernels of splash attention."""
    return _NAME.search(instruction.op_name) is not None


def splash_flops(module: Module, instruction: Instruction) -> float:
    """FLOPs of the blocks that the kernel visits, including the masked halves of blocks on the diagonal."""
    q, k, v = _queries_keys_values(module, instruction)
    widths = {"K": q.shape[-1], "V": v.shape[-1]}
    scores = math.prod(q.shape[:-1]) * k.shape[-2] * _visited_fraction(module, instruction)
    return 2.0 * scores * sum(widths[name] for name in _PRODUCTS[_pass(instruction)])


def splash_bytes(module: Module, instruction: Instruction) -> float:
    """Bytes from and to HBM.

    Each result is written once. What the inner loop runs over is read once per visited block of the outer loop: keys
    and values, or, for their gradients, queries and the arrays of the shape of queries. The rest is read once.
    """
    tables = module.operand(instruction, 1).arrays[0]
    operands = [module.operand(instruction, i).arrays[0] for i in range(2, len(instruction.operands))]
    _, k, v = _queries_keys_values(module, instruction)
    repeats = max(1.0, tables.shape[-2] * _visited_fraction(module, instruction))
    total = float(sum(a.bytes for a in instruction.arrays if a.in_hbm))
    for array in operands:
        is_inner = (array in (k, v)) != (_pass(instruction) == "dkv")
        total += array.bytes * (repeats if is_inner else 1)
    return total


def _pass(instruction: Instruction) -> str:
    """fwd, dq or dkv."""
    match = _NAME.search(instruction.op_name)
    if not match:
        raise ValueError(f"not a kernel of splash attention: {instruction}")
    return match.group(1)


def _queries_keys_values(module: Module, instruction: Instruction) -> list[Array]:
    """[B, H, T, K], [B, G, S, K] and [B, G, S, V]: the first operands after the tables, which hold integers."""
    arrays = (module.operand(instruction, i).arrays[0] for i in range(len(instruction.operands)))
    return [a for a in arrays if not a.dtype.startswith(("s", "pred"))][:3]


def _visited_fraction(module: Module, instruction: Instruction) -> float:
    """The fraction of blocks on or below the diagonal. The kernel's first table is [1, blocks of queries, of keys]."""
    n = max(module.operand(instruction, 0).arrays[0].shape[-2:])
    return (n + 1) / (2 * n)
