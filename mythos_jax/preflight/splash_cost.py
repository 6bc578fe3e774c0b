"""What splash attention (ops/splash_attention.py) costs a chip: unlike other kernels it does not say so itself."""

import math
import re

from mythos_jax.preflight.hlo import Array, Instruction, Module

# Products of one block: scores, sums; their gradients; the scores again.
_PRODUCTS = {"fwd": ("K", "V"), "dq": ("K", "V", "K"), "dkv": ("K", "V", "K", "V")}
_NAME = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


def splash_flops(module: Module, instruction: Instruction) -> float:
    """FLOPs of the blocks that the kernel visits, the masked halves of those on the diagonal included; 0 for any other
    custom call."""
    found = _NAME.search(instruction.op_name)
    if not found:
        return 0.0
    q, k, v = _queries_keys_values(module, instruction)
    widths = {"K": q.shape[-1], "V": v.shape[-1]}
    scores = math.prod(q.shape[:-1]) * k.shape[-2] * _visited(module, instruction)
    return 2.0 * scores * sum(widths[name] for name in _PRODUCTS[found.group(1)])


def splash_bytes(module: Module, instruction: Instruction) -> float:
    """Bytes from and to HBM: each result once, and what the inner loop runs over (keys and values; for their
    gradients queries and what belongs to them) once for each block of the outer loop that visits it."""
    found = _NAME.search(instruction.op_name)
    if not found:
        return 0.0
    tables = module.operand(instruction, 1).arrays[0]
    operands = [module.operand(instruction, i).arrays[0] for i in range(2, len(instruction.operands))]
    _, k, v = _queries_keys_values(module, instruction)
    again = tables.shape[-2] * _visited(module, instruction)
    total = float(sum(a.bytes for a in instruction.arrays if a.in_hbm))
    for array in operands:
        inner = (array in (k, v)) != (found.group(1) == "dkv")
        total += array.bytes * (max(1.0, again) if inner else 1)
    return total


def _queries_keys_values(module: Module, instruction: Instruction) -> list[Array]:
    """[B, H, T, K], [B, G, S, K] and [B, G, S, V], which stand behind the tables: those are of 8 or 32 bit integers."""
    arrays = (module.operand(instruction, i).arrays[0] for i in range(len(instruction.operands)))
    return [a for a in arrays if not a.dtype.startswith(("s", "pred"))][:3]


def _visited(module: Module, instruction: Instruction) -> float:
    """The share of blocks on or below the diagonal. The kernel's first table is [1, blocks of queries, of keys]."""
    n = max(module.operand(instruction, 0).arrays[0].shape[-2:])
    return (n + 1) / (2 * n)
