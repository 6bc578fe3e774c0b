"""Reads optimised HLO text: computations, instructions, and how often each one runs.

XLA's own cost analysis counts the body of a loop once. Here every instruction is counted as often as the loops around
it run. TPU programs do not print trip counts, so these are read from the loops' conditions.

XLA does not document this text. The regular expressions here and in the modules that use this one were read from the
output of the libtpu version in WRITTEN_FOR, with jax 0.10.2. Whatever they do not recognise raises `UnknownHloError`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from mythos_jax.ops.chunked import COUNTED_SCOPE

WRITTEN_FOR = "libtpu 0.0.42.1"

# Tokens order side effects and hold no data.
DTYPE_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8, "f8e3m4": 8,
    "f8e8m0fnu": 8, "f4e2m1fn": 4, "token": 0,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class UnknownHloError(RuntimeError):
    """The compiler printed something whose meaning or cost is not known here, so the counts would be wrong."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(
            f"preflight: unknown {what} in compiled HLO, at {where}; preflight/ was written for {WRITTEN_FOR}. "
            "If your libtpu is another version, install that one; otherwise preflight/ has to be extended"
        )


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type. in_hbm: neither a scalar nor in the chip's fast memory, S(1)."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * DTYPE_BITS[self.dtype] / 8)


@dataclass
class Instruction:
    """One line of HLO. `attributes` is everything after the operands."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    computation: str

    @cached_property
    def arrays(self) -> list[Array]:
        """The arrays of its type: one, or the elements of its tuple."""
        arrays = []
        for dtype, sizes, layout in _SHAPE.findall(self.type):
            if dtype not in DTYPE_BITS:
                raise UnknownHloError(f"dtype {dtype!r}", str(self))
            shape = tuple(int(n) for n in sizes.split(",") if n)
            arrays.append(Array(dtype, shape, in_hbm=bool(shape) and "S(" not in layout))
        return arrays

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self) -> dict[str, list[str]]:
        """The computations it runs, by role."""
        by_role: dict[str, list[str]] = {}
        for role, name in _CALLED.findall(self.attributes):
            by_role.setdefault(role, []).append(name)
        for names in _BRANCHES.findall(self.attributes):
            by_role.setdefault("branches", []).extend(n.strip().lstrip("%") for n in names.split(","))
        return by_role

    @property
    def op_name(self) -> str:
        """Where in the model it comes from, as JAX names it; empty if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    def __str__(self) -> str:
        """Where it is, for error messages."""
        return f"%{self.name} in %{self.computation}" + (f" ({self.op_name})" if self.op_name else "")


@dataclass
class Module:
    """A parsed program. computations: from name to instructions, in order. traced_depth, traced_chunks: how often the
    recurrence and the head run if the program itself does not say."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    traced_depth: float = 1
    traced_chunks: float = 1

    @cached_property
    def by_name(self) -> dict[tuple[str, str], Instruction]:
        return {(i.computation, i.name): i for body in self.computations.values() for i in body}

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that computes an operand."""
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
        """How often a loop's body runs: the constant that its condition compares with.

        If that is not a constant: `traced_depth` for the recurrence, `traced_chunks` for the head, and 1 for other
        loops (more steps over the rows of experts under an uneven load, repeated draws of a sampler).
        """
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if match:
            return int(match.group(1))
        condition = self.computations[loop.called()["condition"][0]]
        constants = {
            i.name: int(i.operands[0])
            for i in condition
            if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type) and i.operands[0].lstrip("-").isdigit()
        }
        bounds = [constants[name] for name in condition[-1].operands if name in constants]
        if len(bounds) == 1 and bounds[0] < 2**31 - 1:
            return bounds[0]
        if re.search(rf"{COUNTED_SCOPE}\)*/while$", loop.op_name):
            return self.traced_chunks
        return self.traced_depth if loop.op_name.endswith("recurrence/while") else 1

    def walk(self) -> Iterator[tuple[Instruction, float]]:
        """Every instruction that runs and how often, including those inside fusions."""
        for name, body in self.computations.items():
            if self.runs[name]:
                for instruction in body:
                    yield instruction, self.runs[name]

    def _topological(self) -> list[str]:
        """Callers before the computations they call."""
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


def parse(text: str, traced_depth: float = 1, traced_chunks: float = 1) -> Module:
    """Parses HLO text as `compiled.as_text()` returns it. Raises UnknownHloError for a line it cannot read."""
    module = Module(traced_depth=traced_depth, traced_chunks=traced_chunks)
    computation: str | None = None
    text = re.sub(r"\n(?=\"|}})", "", text)  # a kernel's metadata is printed on lines of its own
    for line in text.splitlines():
        if computation is None:
            header = _HEADER.match(line)
            if header:
                computation = header.group(2)
                module.computations[computation] = []
                if header.group(1):
                    module.entry = computation
        elif line.startswith("}"):
            computation = None
        elif line.strip():
            module.computations[computation].append(_instruction(line, computation))
    return module


def _instruction(line: str, computation: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    # The opcode is the first lower-case word before a bracket: types have only the layout's T(…) and S(…).
    opcode = _OPCODE.search(match.group(2)) if match else None
    if not match or not opcode:
        raise UnknownHloError("syntax", f"{line.strip()[:100]!r} in %{computation}")
    rest = match.group(2)
    end = _closing_bracket(rest, opcode.end() - 1)
    inside = re.sub(r"/\*.*?\*/", "", rest[opcode.end() : end])
    operands = tuple(word.split()[-1].lstrip("%") for word in _split_at_commas(inside) if word.strip())
    type_ = rest[: opcode.start(1)].strip()
    return Instruction(match.group(1), opcode.group(1), type_, operands, rest[end + 1 :], computation)


def _closing_bracket(text: str, start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


def _split_at_commas(text: str) -> list[str]:
    """Splits at the commas that are outside brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
