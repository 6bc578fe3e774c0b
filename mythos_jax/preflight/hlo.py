"""Reads optimised HLO text: its computations, how often each of them runs, and the source lines of its instructions.

XLA's own cost analysis counts the body of a loop once. Here every instruction is counted as often as the loops around
it run. TPU programs do not print trip counts, so these are read from the loops themselves.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from mythos_jax.ops.chunked import COUNTED_SCOPE
from mythos_jax.ops.expectations import expected_trips
from mythos_jax.preflight.instructions import Instruction, UnknownHloError, read_instruction

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_SECTIONS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# Opcodes whose result is their operand.
_SAME_VALUE = ("copy", "bitcast")
# Constants from here on stand for "no bound".
_UNBOUNDED = 2**31 - 1


@dataclass
class Module:
    """A parsed program. computations: from name to instructions, in order. sources: what `source` reads. traced_depth,
    traced_chunks: how often the recurrence and the head run if the program itself does not say."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    sources: dict[str, dict[int, str]] = field(default_factory=dict)
    traced_depth: float = 1
    traced_chunks: float = 1

    @cached_property
    def by_name(self) -> dict[tuple[str, str], Instruction]:
        return {(i.computation, i.name): i for body in self.computations.values() for i in body}

    @cached_property
    def callers(self) -> dict[str, Instruction]:
        """The instruction that runs each computation; the last, if there are several."""
        instructions = (i for body in self.computations.values() for i in body)
        return {name: i for i in instructions for names in i.called().values() for name in names}

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
        """How often a loop's body runs: what the program says, or else what is expected of it (`expected`), or 1."""
        counts = (self._known_trips(loop), self.expected(loop))
        return next((count for count in counts if count is not None), 1)

    def expected(self, loop: Instruction) -> float | None:
        """How often a loop whose length is known only at run time is expected to run; None if nobody says."""
        if re.search(rf"{COUNTED_SCOPE}\)*/while$", loop.op_name):
            return self.traced_chunks
        return self.traced_depth if loop.op_name.endswith("recurrence/while") else expected_trips(loop.op_name)

    def open_loops(self) -> list[Instruction]:
        """Loops that count as running once because neither the program nor its author says how often they run."""
        loops = [i for i, _ in self.walk() if i.opcode == "while"]
        return [i for i in loops if self._known_trips(i) is None and self.expected(i) is None]

    def _known_trips(self, loop: Instruction) -> int | None:
        """The number that the program says: the compiler's own count, or (bound - start) / step of the counter that the
        condition compares with a constant."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if match:
            return int(match.group(1))
        condition = self.computations[loop.called()["condition"][0]][-1]
        compared = [self.by_name[condition.computation, name] for name in condition.operands]
        bounds = [bound for i in compared if (bound := _constant(i)) is not None]
        if len(bounds) != 1 or bounds[0] >= _UNBOUNDED:
            return None
        counter = next((i for i in compared if i.opcode == "get-tuple-element"), None)
        if counter is None:
            raise UnknownHloError("counter of a loop", str(loop))
        start, step = self._start(loop, counter.tuple_index), self._step(loop, counter.tuple_index)
        return -(-(bounds[0] - start) // step)

    def _start(self, loop: Instruction, index: int) -> int:
        """The value of a loop's counter before the loop; 0 if the program does not say."""
        state = self.operand(loop, 0)
        return (_constant(self.through(_SAME_VALUE, self.operand(state, index))) or 0) if state.opcode == "tuple" else 0

    def _step(self, loop: Instruction, index: int) -> int:
        """What a loop's body adds to its counter."""
        result = self.computations[loop.called()["body"][0]][-1]
        added = self.through(_SAME_VALUE, self.operand(result, index)) if result.opcode == "tuple" else result
        if added.opcode == "add":
            terms = [_constant(self.through(_SAME_VALUE, self.operand(added, i))) for i in range(2)]
            steps = [term for term in terms if term is not None]
            if len(steps) == 1 and steps[0] > 0:
                return steps[0]
        raise UnknownHloError("step of a loop", str(loop))

    def through(self, opcodes: Iterable[str], instruction: Instruction) -> Instruction:
        """What an instruction hands on, seen through any number of these opcodes."""
        while instruction.opcode in opcodes:
            instruction = self.operand(instruction, 0)
        return instruction

    def source(self, instruction: Instruction) -> str:
        """The innermost line of this package that an instruction comes from, `ops/attention.py:87`, or of any other
        package if there is none; empty if unknown."""
        plain = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
        if plain:
            return _short(plain.group(1)) + ":" + plain.group(2)
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        lines = list(self._lines(int(frame.group(1)))) if frame else []
        ours = [line for line in lines if "/mythos_jax/" in line]
        return _short(next(iter(ours or lines), ""))

    def _lines(self, frame: int) -> Iterator[str]:
        """The source lines of a stack, the innermost first. Parents are printed with 1 added, and 1 means none."""
        while frame in self.sources.get("StackFrames", {}):
            location, parent = _numbers(self.sources["StackFrames"][frame])
            file, _, line = _numbers(self.sources["FileLocations"][location])[:3]
            yield f"{self.sources['FileNames'][file][1:-1]}:{line}"
            frame = parent - 1

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
    section: dict[int, str] = {}
    text = re.sub(r"\n(?=\"|}})", "", text)  # a kernel's metadata is printed on lines of its own
    text = re.sub(r'\bir = "(?:[^"\\]|\\.)*"', 'ir = ""', text)  # a Triton kernel's program, as bytes
    for line in text.splitlines():
        if computation is None:
            header, entry = _HEADER.match(line), re.match(r"(\d+) (.*)", line)
            if header:
                computation = header.group(2)
                module.computations[computation] = []
                if header.group(1):
                    module.entry = computation
            elif line in _SECTIONS:
                section = module.sources[line] = {}
            elif entry:
                section[int(entry.group(1))] = entry.group(2)
        elif line.startswith("}"):
            computation = None
        elif line.strip():
            module.computations[computation].append(read_instruction(line, computation))
    return module


def _constant(instruction: Instruction) -> int | None:
    """The value of an integer constant; None for anything else."""
    if instruction.opcode != "constant" or not re.match(r"[su]\d+\[\]", instruction.type):
        return None
    value = instruction.operands[0]
    return int(value) if value.lstrip("-").isdigit() else None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"=(\d+)", text)]


def _short(path: str) -> str:
    """A path without the folders above the package it is in."""
    return re.sub(r"^.*/(?:mythos_jax|site-packages)/", "", path)
