"""What custom calls cost: kernels written in Pallas, and the compiler's own."""

import re
from dataclasses import dataclass

from mythos_jax.preflight import gpu_cost
from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Instruction, UnknownHloError
from mythos_jax.preflight.megablox_cost import is_megablox, megablox_bytes, megablox_flops
from mythos_jax.preflight.splash_cost import is_splash, splash_bytes, splash_flops

# The target of Mosaic (Pallas) kernels.
KERNEL = "tpu_custom_call"
# Targets of which a call costs something.
COUNTED = {KERNEL, *gpu_cost.TARGETS}


@dataclass(frozen=True)
class KernelCost:
    """Of one run. hbm_bytes: from and to HBM. is_reported: a kernel says it of itself and nobody has counted it."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    is_reported: bool = False


def target(instruction: Instruction) -> str:
    """The target of a custom call."""
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    if not match:
        raise UnknownHloError("custom call without a target", str(instruction))
    return match.group(1)


def kernel_cost(module: Module, instruction: Instruction) -> KernelCost:
    """Of a custom call: counted if the kernel is known here, or else what it reports. The compiler's own are free.

    Raises UnknownHloError for a kernel that is not known and reports nothing.
    """
    if target(instruction) == KERNEL:
        if is_megablox(module, instruction):
            return KernelCost(megablox_flops(module, instruction), megablox_bytes(module, instruction))
        if is_splash(instruction):
            return KernelCost(splash_flops(module, instruction), splash_bytes(module, instruction))
    if target(instruction) in gpu_cost.TARGETS:
        return KernelCost(*gpu_cost.gpu_kernel_cost(module, instruction, target(instruction)))
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes)
    if estimate:
        numbers = dict(re.findall(r'"(\w+)":"?(\d+)', estimate.group(1)))
        return KernelCost(float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0)), is_reported=True)
    if target(instruction) == KERNEL or target(instruction).startswith(("__cublas", "__cudnn")):
        raise UnknownHloError("cost of a kernel", str(instruction))
    return KernelCost()
