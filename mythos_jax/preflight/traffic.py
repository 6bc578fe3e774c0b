"""Bytes between a chip's memory (HBM) and its core, for one run of an instruction outside fusions."""

import math
import re

from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Array, Instruction
from mythos_jax.preflight.kernels import kernel_cost
from mythos_jax.preflight.opcodes import FREE, FUSIONS, PARTIAL_READS

# Opcodes that give their operand's bytes another shape.
_SAME_BYTES = ("bitcast",)


def hbm_bytes(module: Module, instruction: Instruction) -> float:
    """What an instruction reads from HBM and writes to it."""
    opcode = instruction.opcode
    if opcode in FREE:
        return 0.0
    if opcode == "custom-call":
        return kernel_cost(module, instruction).hbm_bytes
    if opcode in FUSIONS:
        return _read_by_fusion(module, instruction) + _written_by_fusion(module, instruction)
    if opcode.endswith("-start"):
        return _started(instruction)
    if opcode == "dynamic-update-slice":
        buffer, update = (module.operand(instruction, i).arrays[0] for i in range(2))
        return float(update.bytes * (update.in_hbm + buffer.in_hbm))
    if opcode in PARTIAL_READS:
        return instruction.bytes * (_in_hbm(module.operand(instruction, 0)) > 0) + _in_hbm(instruction)
    operands = {name: module.operand(instruction, i) for i, name in enumerate(instruction.operands)}
    return _in_hbm(instruction) + sum(_in_hbm(operand) for operand in operands.values())


def _in_hbm(instruction: Instruction) -> float:
    return float(sum(a.bytes for a in instruction.arrays if a.in_hbm))


def _started(instruction: Instruction) -> float:
    """Of an asynchronous operation, whose type holds its operand, its result and counters.

    A slice moves its result, which is the smaller of the two; a copy or a collective moves the larger.
    """
    sizes = [a.bytes for a in instruction.arrays if a.shape]
    is_slice = re.match(r"(dynamic-)?slice-start", instruction.opcode)
    return float((min if is_slice else max)(sizes, default=0))


def _read_by_fusion(module: Module, fusion: Instruction) -> float:
    """An operand that is given twice is read once, as long as its parts are not more than all of it."""
    needed: dict[str, float] = {}
    for i, name in enumerate(fusion.operands):
        needed[name] = needed.get(name, 0.0) + _part_read(module, fusion, i)
    return sum(min(_in_hbm(module.by_name[fusion.computation, name]), size) for name, size in needed.items())


def _part_read(module: Module, fusion: Instruction, index: int) -> float:
    """Bytes that a fusion reads of an operand; infinity (all of them) unless every use takes only a part."""
    body = _body(module, fusion)
    names = {i.name for i in body if i.opcode == "parameter" and i.operands == (str(index),)}
    total = 0.0
    for i in body:  # in order: whatever uses a name comes after it
        for at, name in enumerate(i.operands):
            if name not in names or i.opcode == "parameter":
                continue
            if i.opcode == "bitcast":
                names.add(i.name)
            elif i.opcode in PARTIAL_READS and at == 0:
                total += i.bytes
            elif i.opcode == "fusion":
                total += _part_read(module, i, at)
                if _updates(module, i, at):
                    names.add(i.name)
            elif i.opcode == "dynamic-update-slice" and at == 0:
                names.add(i.name)  # written in place; read only by what uses the result
            elif i.opcode not in ("tuple", "get-tuple-element"):
                return math.inf
    return total


def _updates(module: Module, fusion: Instruction, index: int) -> bool:
    """Whether a fusion hands on operand `index`, updated in place."""
    root = module.through(_SAME_BYTES, _body(module, fusion)[-1])
    if root.opcode != "dynamic-update-slice":
        return False
    buffer = module.through(_SAME_BYTES, module.operand(root, 0))
    return buffer.opcode == "parameter" and buffer.operands == (str(index),)


def _written_by_fusion(module: Module, fusion: Instruction) -> float:
    """Each of its results whole, or, if it is a buffer updated in place, the update."""
    body = _body(module, fusion)
    roots = (
        [module.operand(body[-1], i) for i in range(len(body[-1].operands))]
        if body[-1].opcode == "tuple"
        else body[-1:]
    )
    # The type of one that is started holds its operands, too.
    arrays = fusion.arrays if fusion.opcode == "fusion" else [array for root in roots for array in root.arrays]
    if len(roots) != len(arrays):
        return _in_hbm(fusion)
    return sum(_part_written(module, root, array) for root, array in zip(roots, arrays, strict=True) if array.in_hbm)


def _part_written(module: Module, root: Instruction, array: Array) -> float:
    root = module.through(_SAME_BYTES, root)
    if root.opcode == "dynamic-update-slice":
        return float(module.operand(root, 1).bytes)
    if root.opcode == "fusion" and len(root.arrays) == 1:
        return _part_written(module, _body(module, root)[-1], array)
    return float(array.bytes)


def _body(module: Module, fusion: Instruction) -> list[Instruction]:
    return module.computations[fusion.called()["calls"][0]]
