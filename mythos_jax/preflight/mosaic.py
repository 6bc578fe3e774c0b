"""Reads the program of a Mosaic (Pallas) kernel, which a compiled TPU program holds in MLIR's binary form."""

import base64
import re
from functools import cache

from mythos_jax.preflight.instructions import Instruction, UnknownHloError

_BLOCK = re.compile(r"memref<((?:\d+x)+)\w+, #tpu\.memory_space<\w+>>")


def kernel_text(instruction: Instruction) -> str:
    """A kernel's program as text."""
    body = re.search(r'"body":"([^"]*)"', instruction.attributes)
    if not body:
        raise UnknownHloError("kernel without a program", str(instruction))
    return _text(body.group(1))


@cache  # FLOPs and bytes of a kernel are asked for one by one, and many calls have the same program
def _text(body: str) -> str:
    from jax._src.lib import tpu  # jax has no public name for the dialect
    from jax.extend.mlir import ir

    with ir.Context() as context:
        tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        return str(ir.Module.parse(base64.b64decode(body)))


def block_shapes(instruction: Instruction) -> list[tuple[int, ...]]:
    """The shapes of what a kernel sees at each step of its grid: blocks of its operands and its results, then buffers
    of its own. It does not see an operand that is the length of its grid."""
    signature = re.search(r"^  \^bb0\((.*)\):$", kernel_text(instruction), flags=re.MULTILINE)
    if not signature:
        raise UnknownHloError("program of a kernel", str(instruction))
    return [tuple(int(n) for n in sizes.split("x") if n) for sizes in _BLOCK.findall(signature.group(1))]
