"""A step as its compiler leaves it: its text, the memory that it needs, and whether it is refused for that."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mythos_jax.chips import GIB
from mythos_jax.config import ModelConfig
from mythos_jax.preflight.devices import GPU_OPTIONS

# Compiler options for `quick`: less search for fast code. Memory and FLOPs stay within a few percent (docs/pods.md).
_QUICK = {"exec_time_optimization_effort": -1.0}


@dataclass(frozen=True)
class Program:
    """A compiled step.

    state: abstract arrays by part of the state (parameters, optimizer, …). text: optimised HLO; empty if the compiler
    gave up before it had any. temporaries: peak bytes per chip besides the state. code: bytes per chip. needed: bytes
    per chip that the compiler refuses to give; 0 if it does not refuse, NaN if it does not say. live_ranges,
    assignment: what XLA writes of its buffers (buffers.py). teacher: the model that a train step learns from.
    """

    mesh: Mesh
    state: dict[str, Any]
    text: str = ""
    temporaries: int = 0
    code: int = 0
    needed: float = 0.0
    live_ranges: str = ""
    assignment: str = ""
    teacher: ModelConfig | None = None


def compile_lowered(lowered: Any, mesh: Mesh, state: dict[str, Any], quick: bool) -> Program:
    """quick: with less search for fast code."""
    options: dict[str, Any] = _QUICK if quick else {}
    if mesh.devices.flat[0].platform == "gpu":
        options = options | GPU_OPTIONS
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile(compiler_options=options | {"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            needed = read_refusal(str(error))
            if needed is None:
                raise
            texts = _written(folder)
            return Program(mesh, state, text=texts[0], needed=needed, live_ranges=texts[1], assignment=texts[2])
        _, live_ranges, assignment = _written(folder)
    memory = compiled.memory_analysis()
    return Program(
        mesh,
        state,
        text=compiled.as_text(),
        # The peak is what the compiler compares with the chip's memory. `temp_size` would be the sum over all buffers.
        temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        live_ranges=live_ranges,
        assignment=assignment,
    )


def _written(folder: str) -> list[str]:
    """What XLA writes of a program also when it refuses it: the program, live ranges and the assignment of buffers."""
    found = []
    for name in ("after_optimizations", "after_optimizations-live-range", "after_optimizations-buffer-assignment"):
        files = sorted(Path(folder).glob(f"*{name}.txt"), key=lambda file: file.stat().st_size)
        found.append(files[-1].read_text(encoding="utf-8") if files else "")
    return found


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)B?"


def read_refusal(message: str) -> float | None:
    """The bytes that a program needs, from the compiler's message that it does not fit: NaN if the message does not say
    it, None if it is about something else."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    used = re.search(rf"Used {_SIZE} of", message) or re.search(rf"\({_SIZE}\) exceeds available", message)
    return float(used.group(1)) * _UNITS[used.group(2)] if used else float("nan")
