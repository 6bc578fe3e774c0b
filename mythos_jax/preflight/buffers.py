"""What fills a chip's memory at its fullest, from the files that XLA writes about its assignment of buffers.

XLA names a buffer after an instruction and the element of its result, as in `while.12{3}`. The state of a loop has one
name before the loop, in it and after it, so what has the same place in memory is one buffer.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from mythos_jax.preflight.causes import part, phase
from mythos_jax.preflight.hlo import Module
from mythos_jax.preflight.instructions import Instruction
from mythos_jax.preflight.opcodes import FUSIONS

_VALUE = re.compile(r"^ value: <\d+ ([^ {]+)(?:\{([\d,]*)\})?.*? @\d+> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])")
_RANGE = re.compile(r"^    ([^ {]+)\{([\d,]*)\}:(\d+)-(\d+)$", flags=re.MULTILINE)
# What buffers hold, by the phase of the step that fills them.
_HOLDS = {"forward": "forward pass", "again": "recomputed", "backward": "backward pass", "": "other"}
_COPIES = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape", "transpose")
_DEPTH = 1000  # steps from a buffer to what fills it; loops inside loops may lead in a circle


@dataclass(frozen=True)
class Buffer:
    """Buffers of one type and origin. bytes: per chip, of all together. holds: state, gathered weights, forward pass,
    recomputed, backward pass or other. part: of the model. source: line of the program."""

    bytes: float
    count: int
    type: str
    holds: str
    part: str
    source: str


@dataclass(frozen=True)
class _Value:
    """What is in one place of memory for a time, in steps of the program. place: allocation and offset."""

    name: str
    index: int
    place: tuple[str, int]
    size: int
    type: str
    start: int = 0
    end: int = 0


def peak_buffers(module: Module, live_ranges: str, assignment: str) -> list[Buffer]:
    """The buffers at the peak, the largest first. live_ranges, assignment: texts of `…-live-range.txt` and
    `…-buffer-assignment.txt`."""
    values, arguments = _values(assignment)
    timed = [
        replace(values[name, index], start=int(start), end=int(end))
        for name, index, start, end in _RANGE.findall(live_ranges)
        if (name, index) in values
    ]
    instructions = {i.name: i for body in module.computations.values() for i in body}
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for names in _at_peak(timed).values():
        made = [(v, origin(module, instructions[v.name], v.index)) for v in names if v.name in instructions]
        if made:
            value, made_by = max(made, key=lambda pair: (pair[0].size, phase(pair[1].op_name) != ""))
            holds = "state" if value.place[0] in arguments else _holds(made_by)
            key = (value.type, holds, part(made_by.op_name), module.source(made_by))
            groups.setdefault(key, []).append(value.size)
    found = [Buffer(float(sum(each)), len(each), *key) for key, each in groups.items()]
    return sorted(found, key=lambda buffer: -buffer.bytes)


def _at_peak(values: list[_Value]) -> dict[tuple[str, int], list[_Value]]:
    """What is where, at the step with the most bytes. XLA's own peak counts each name of a buffer."""
    if not values:
        return {}
    last = max(value.end for value in values)
    at_place: dict[tuple[str, int], np.ndarray] = {}
    for value in values:
        sizes = at_place.setdefault(value.place, np.zeros(last + 1, np.int64))
        span = sizes[value.start : value.end + 1]
        np.maximum(span, value.size, out=span)
    peak = int(np.argmax(sum(at_place.values())))
    found: dict[tuple[str, int], list[_Value]] = {}
    for value in values:
        if value.start <= peak <= value.end:
            found.setdefault(value.place, []).append(value)
    return found


def held(buffers: Iterable[Buffer]) -> dict[str, float]:
    """Bytes by what they hold, the largest first."""
    totals: dict[str, float] = {}
    for buffer in buffers:
        totals[buffer.holds] = totals.get(buffer.holds, 0.0) + buffer.bytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def origin(module: Module, instruction: Instruction, index: int = 0) -> Instruction:
    """The instruction that makes what a buffer holds. index: the element of a tuple.

    Of the state of a loop that is the one inside the loop that writes this element, or the one before the loop if none
    does; of an array that is filled part by part, the one that makes a part.
    """
    for _ in range(_DEPTH):
        step = _before(module, instruction, index)
        if step is None:
            return instruction
        instruction, index = step
    return instruction


def _before(module: Module, instruction: Instruction, index: int) -> tuple[Instruction, int] | None:
    """Where a value comes from that an instruction only hands on; None if the instruction makes it."""
    opcode = instruction.opcode
    if opcode == "get-tuple-element":
        return module.operand(instruction, 0), instruction.tuple_index
    if opcode == "tuple":
        return module.operand(instruction, index), 0
    if opcode in _COPIES:
        return module.operand(instruction, 0), 0
    if opcode == "dynamic-update-slice":
        return module.operand(instruction, 1), 0
    caller = module.callers.get(instruction.computation)
    if opcode == "while":
        body = module.computations[instruction.called()["body"][0]]
        written = module.operand(body[-1], index) if body[-1].opcode == "tuple" else body[-1]
        return (module.operand(instruction, 0), index) if _is_unchanged(module, written, index) else (written, 0)
    if opcode == "parameter" and caller is not None:
        if caller.opcode == "while":
            return caller, index
        return (module.operand(caller, int(instruction.operands[0])), index) if caller.opcode in FUSIONS else None
    if opcode == "fusion":
        root = module.computations[instruction.called()["calls"][0]][-1]
        root = module.operand(root, index) if root.opcode == "tuple" else root
        return (root, 0) if root.opcode in (*_COPIES, "dynamic-update-slice") else None
    return None


def _is_unchanged(module: Module, written: Instruction, index: int) -> bool:
    """Whether a loop hands on an element of its state as it was."""
    written = module.through(_COPIES, written)
    from_state = written.opcode == "get-tuple-element" and module.operand(written, 0).opcode == "parameter"
    return from_state and written.tuple_index == index


def _holds(made_by: Instruction) -> str:
    if made_by.opcode == "parameter":
        return "state"
    return "gathered weights" if made_by.opcode.startswith("all-gather") else _HOLDS[phase(made_by.op_name)]


def _values(assignment: str) -> tuple[dict[tuple[str, str], _Value], set[str]]:
    """The values in a chip's memory, by name and element. Also the allocations of the program's arguments."""
    values, arguments, allocation = {}, set(), ""
    for line in assignment.splitlines():
        head = re.match(r"allocation (\d+): size \d+(.*)", line)
        if head:
            in_hbm = not re.search(r"color [1-9]", head.group(2))
            allocation = head.group(1) if in_hbm else ""
            if " parameter " in head.group(2):
                arguments.add(allocation)
        value = _VALUE.match(line) if allocation else None
        if value:
            name, index, size, offset, type_ = value.groups()
            element = int((index or "0").split(",")[0])
            values[name, index or ""] = _Value(name, element, (allocation, int(offset)), int(size), type_)
    return values, arguments
