"""Where the time of a compiled program goes: its instructions, those of the same origin and shape taken together."""

import re
from dataclasses import dataclass

from mythos_jax.chips import Chip
from mythos_jax.ops.expectations import is_expectation
from mythos_jax.preflight.cost import Cost
from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Instruction
from mythos_jax.preflight.kernels import KERNEL, target

# Parts of a name that say how JAX runs an operation, not which one it is.
_MACHINERY = {
    "", "body", "branch_0_fun", "branch_1_fun", "checkpoint", "closed_call", "cond", "jvp", "pallas_call", "pjit",
    "rematted_computation", "shard_map", "transpose", "vmap", "while",
}  # fmt: skip


@dataclass(frozen=True)
class Cause:
    """Instructions of one origin and shape.

    what: opcode and type. phase: forward, again (recomputed) or backward; empty outside the model. part: of the model.
    source: line of the program. count: instructions. runs: of each per step. flops, hbm_bytes: of all runs together.
    compute_seconds: of the products, of all runs together. seconds: at least, of all runs together. in_background: as
    in InstructionCost.
    """

    what: str
    phase: str
    part: str
    source: str
    count: int
    runs: float
    flops: float
    hbm_bytes: float
    compute_seconds: float
    seconds: float
    in_background: bool


def find_causes(module: Module, cost: Cost, chip: Chip) -> list[Cause]:
    """All of them, those that take longest first."""
    groups: dict[tuple[str, str, str, str, float, bool], list[tuple[float, ...]]] = {}
    for item in cost.instructions:
        i, runs = item.instruction, item.runs
        key = (_what(i), phase(i.op_name), part(i.op_name), module.source(i), runs, item.in_background)
        groups.setdefault(key, []).append(
            (runs * item.flops, runs * item.hbm_bytes, item.compute_seconds(chip), item.seconds(chip))
        )
    found = []
    for (what, when, where, source, runs, in_background), items in groups.items():
        flops, moved, compute, seconds = (sum(column) for column in zip(*items, strict=True))
        found.append(Cause(what, when, where, source, len(items), runs, flops, moved, compute, seconds, in_background))
    return sorted(found, key=lambda cause: -cause.seconds)


def phase(op_name: str) -> str:
    """Of a train step: forward, again (recomputed in the backward pass) or backward; empty for anything else."""
    if "rematted_computation" in op_name:
        return "again"
    return "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""


def part(op_name: str) -> str:
    """The last names of an operation that say which one it is, such as `layer_*/attention/dot_general`: parts of the
    model that differ in their number alone are taken together."""
    names = op_name.split("/")[1:]  # the first is the whole step
    names = [re.sub(r"^(?:\w+\()+|\)+$", "", name) for name in names]
    names = [re.sub(r"_\d+$", "_*", name) for name in names if not is_expectation(name)]
    names = [name for name in names if name not in _MACHINERY]
    return "/".join([name for name, before in zip(names, [None, *names], strict=False) if name != before][-3:])


def _what(instruction: Instruction) -> str:
    """Opcode and type, without layouts."""
    arrays = [f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in instruction.arrays]
    # What a collective or a copy holds besides its operand and its result is of no interest.
    shown = ", ".join(arrays[:2]) + (", …" if len(arrays) > 2 else "")
    is_kernel = instruction.opcode == "custom-call" and target(instruction) == KERNEL
    kind = "kernel" if is_kernel else instruction.opcode
    return f"{kind} {shown}"
