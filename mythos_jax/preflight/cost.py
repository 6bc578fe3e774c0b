"""What a compiled program costs a chip, instruction by instruction: FLOPs of matrix products, and bytes from HBM.

Only matrix products are counted as FLOPs; the rest is negligible in comparison. An opcode that is neither a product nor
known to be none (opcodes.py), or a kernel whose cost nobody knows, raises UnknownHloError: ignoring it could hide most
of a program's cost. The compiler also has custom calls of its own for small tasks, with names that change from version
to version. They count as free, and those not in FREE_CUSTOM_CALLS are listed as `uncounted`.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from mythos_jax.chips import Chip
from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Instruction, UnknownHloError
from mythos_jax.preflight.kernels import COUNTED, kernel_cost, target
from mythos_jax.preflight.opcodes import COMMUNICATION, FREE, FREE_CUSTOM_CALLS, FUSIONS, STREAMED
from mythos_jax.preflight.products import convolution_flops, dot_flops, narrow_kind
from mythos_jax.preflight.traffic import hbm_bytes

# An asynchronous operation is printed as `copy-start`, `copy-update` and `copy-done`.
_ASYNCHRONOUS = re.compile(r"-(start|update|done)$")


@dataclass(frozen=True)
class InstructionCost:
    """One instruction with all that is fused into it. runs: per step. flops, hbm_bytes: of one run. narrow: the part of
    the flops whose operands have 8 bits, by kind."""

    instruction: Instruction
    runs: float
    flops: float
    hbm_bytes: float
    narrow: Counter[str] = field(default_factory=Counter)

    @property
    def in_background(self) -> bool:
        """Whether it runs beside the instructions after it (copies ahead of their use) or waits for other chips."""
        return self.instruction.opcode.endswith("-start") or self.instruction.opcode in COMMUNICATION

    def seconds(self, chip: Chip) -> float:
        """At least, in all runs: products and HBM overlap."""
        return max(self.compute_seconds(chip), self.runs * self.hbm_bytes / chip.hbm_bandwidth)

    def compute_seconds(self, chip: Chip) -> float:
        """Of the products, in all runs; those in 8 bits take half the time where the chip has units for them."""
        twice_as_fast = sum(flops for kind, flops in self.narrow.items() if kind in chip.narrow)
        return self.runs * (self.flops - twice_as_fast / 2) / chip.flops


@dataclass(frozen=True)
class Cost:
    """The cost of one execution, per chip. uncounted: custom calls that count as free but are not known to be.
    reported: kernels whose cost is what they say themselves."""

    instructions: tuple[InstructionCost, ...]
    uncounted: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        return sum(i.runs * i.flops for i in self.instructions)

    @property
    def hbm_bytes(self) -> float:
        return sum(i.runs * i.hbm_bytes for i in self.instructions)

    @property
    def narrow_flops(self) -> float:
        """Those of products in 8 bits."""
        return sum(i.runs * sum(i.narrow.values()) for i in self.instructions)

    def compute_seconds(self, chip: Chip) -> float:
        return sum(i.compute_seconds(chip) for i in self.instructions)

    def seconds(self, chip: Chip) -> float:
        """At least, if instructions run one after the other, as they do on a core; no less than all HBM traffic takes.

        What runs in the background counts only as traffic.
        """
        one_after_another = sum(i.seconds(chip) for i in self.instructions if not i.in_background)
        return max(one_after_another, self.hbm_bytes / chip.hbm_bandwidth)


def cost(module: Module) -> Cost:
    """The cost of all instructions. Raises UnknownHloError if one has no known cost."""
    # Inside fusions and the functions of reductions, values never reach HBM.
    inside = {
        name
        for body in module.computations.values()
        for i in body
        for role, names in i.called().items()
        if (role == "calls" and i.opcode in FUSIONS) or role == "to_apply"
        for name in names
    }
    costs, targets, reported = [], set(), set()
    for instruction, runs in module.walk():
        if instruction.opcode == "custom-call":
            targets.add(target(instruction))
            if kernel_cost(module, instruction).is_reported:
                reported.add(instruction.op_name.removesuffix("/pallas_call").rpartition("/")[2])
        if instruction.computation not in inside:
            flops, moved = matmul_flops(module, instruction), hbm_bytes(module, instruction)
            if flops or moved:
                costs.append(InstructionCost(instruction, runs, flops, moved, narrow_flops(module, instruction)))
    return Cost(tuple(costs), tuple(sorted(targets - FREE_CUSTOM_CALLS - COUNTED)), tuple(sorted(reported)))


def matmul_flops(module: Module, instruction: Instruction) -> float:
    """FLOPs of a matrix product, of a kernel, or of the products inside a fusion; else 0.

    Raises UnknownHloError for an instruction whose cost is unknown.
    """
    opcode = instruction.opcode
    if opcode in FUSIONS:
        return sum(matmul_flops(module, i) for name in instruction.called()["calls"] for i in module.computations[name])
    if opcode == "custom-call":
        return kernel_cost(module, instruction).flops
    if opcode == "dot":
        return dot_flops(module, instruction)
    if opcode == "convolution":
        return convolution_flops(module, instruction)
    if not {opcode, _ASYNCHRONOUS.sub("", opcode)} & (FREE | STREAMED):
        raise UnknownHloError(f"opcode {opcode!r}", str(instruction))
    return 0.0


def narrow_flops(module: Module, instruction: Instruction) -> Counter[str]:
    """The part of `matmul_flops` whose operands have 8 bits, by kind."""
    if instruction.opcode in FUSIONS:
        bodies = (module.computations[name] for name in instruction.called()["calls"])
        return sum((narrow_flops(module, i) for body in bodies for i in body), Counter())
    kind = narrow_kind(module, instruction) if instruction.opcode in ("dot", "convolution") else None
    return Counter({kind: matmul_flops(module, instruction)}) if kind else Counter()
