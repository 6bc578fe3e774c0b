"""Reading optimised HLO text: computations, instructions, and how often each runs.

XLA's own cost analysis counts the body of a loop once; here every instruction carries the product of the trip counts
of the loops around it. TPU programs do not print trip counts, so they are read off the loops' conditions.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type. in_hbm: not a scalar, nor in the chip's fast memory, S(1)."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * DTYPE_BITS.get(self.dtype, 0) / 8)


@dataclass
class Instruction:
    """One line of HLO. `attributes` is all that follows the operands."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    computation: str

    @cached_property
    def arrays(self) -> list[Array]:
        """Those of its type: one, or the elements of its tuple."""
        return [
            Array(dtype, tuple(int(n) for n in sizes.split(",") if n), bool(sizes) and "S(" not in (layout or ""))
            for dtype, sizes, layout in _SHAPE.findall(self.type)
        ]

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self) -> dict[str, list[str]]:
        """Computations it runs, by role."""
        found: dict[str, list[str]] = {}
        for role, name in _CALLED.findall(self.attributes):
            found.setdefault(role, []).append(name)
        for names in _BRANCHES.findall(self.attributes):
            found.setdefault("branches", []).extend(n.strip().lstrip("%") for n in names.split(","))
        return found

    @property
    def op_name(self) -> str:
        """Where in the model it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclass
class Module:
    """A parsed program. computations: name to instructions, in order. traced_depth: how often the recurrence runs where
    the program does not say."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    traced_depth: float = 1

    @cached_property
    def by_name(self) -> dict[tuple[str, str], Instruction]:
        return {(i.computation, i.name): i for body in self.computations.values() for i in body}

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.by_name[instruction.computation, instruction.operands[index]]

    @cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs in one execution of the program."""
        counts = dict.fromkeys(self.computations, 0.0)
        counts[self.entry] = 1.0
        for name in self._topological():
            for instruction in self.computations[name]:
                for role, called in instruction.called().items():
                    times = self.trips(instruction) if role in ("body", "condition") else 1
                    for target in called:
                        counts[target] += counts[name] * times
        return counts

    def trips(self, loop: Instruction) -> float:
        """The constant that a loop's condition compares with. Where it is none: `traced_depth` for the recurrence, 1
        for other loops (further rounds of experts under an uneven load, draws of a sampler)."""
        told = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if told:
            return int(told.group(1))
        condition = self.computations[loop.called()["condition"][0]]
        constants = {
            i.name: int(i.operands[0])
            for i in condition
            if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type) and i.operands[0].lstrip("-").isdigit()
        }
        bounds = [constants[name] for name in condition[-1].operands if name in constants]
        if len(bounds) == 1 and bounds[0] < 2**31 - 1:
            return bounds[0]
        return self.traced_depth if loop.op_name.endswith("recurrence/while") else 1

    def walk(self) -> Iterator[tuple[Instruction, float]]:
        """Every instruction with how often it runs, those inside of fusions too."""
        for name, body in self.computations.items():
            if self.runs[name]:
                for instruction in body:
                    yield instruction, self.runs[name]

    def _topological(self) -> list[str]:
        """Callers before what they call."""
        order, seen = [], set()

        def visit(name: str) -> None:
            seen.add(name)
            for instruction in self.computations[name]:
                for called in instruction.called().values():
                    for target in called:
                        if target not in seen:
                            visit(target)
            order.append(name)

        visit(self.entry)
        return order[::-1]


def parse(text: str, traced_depth: float = 1) -> Module:
    """HLO text, as `compiled.as_text()` gives it."""
    module, current = Module(traced_depth=traced_depth), None
    text = re.sub(r"\n(?=\"|}})", "", text)  # what a kernel tells of itself stands on lines of its own
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = header.group(2)
                module.computations[current] = []
                if header.group(1):
                    module.entry = current
        elif line.startswith("}"):
            current = None
        else:
            found = _INSTRUCTION.match(line)
            if found:
                module.computations[current].append(_instruction(found.group(1), found.group(2), current))
    return module


def _instruction(name: str, rest: str, computation: str) -> Instruction:
    # A type holds no word before a bracket but the layout's T(…) and S(…), which are upper case.
    opcode = _OPCODE.search(rest)
    end = _closing(rest, opcode.end() - 1)
    inside = re.sub(r"/\*.*?\*/", "", rest[opcode.end() : end])
    operands = tuple(word.split()[-1].lstrip("%") for word in _split(inside) if word.strip())
    return Instruction(name, opcode.group(1), rest[: opcode.start(1)].strip(), operands, rest[end + 1 :], computation)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
