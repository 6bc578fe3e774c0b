"""Single lines of optimised HLO text: arrays, opcodes, operands.

XLA does not document this text. The regular expressions here and in the modules that use this one were read from the
output of the compilers in WRITTEN_FOR, with jax 0.10.2. Whatever they do not recognise raises `UnknownHloError`.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

WRITTEN_FOR = "libtpu 0.0.42.1 and jax's CUDA plugin 0.10.2"

# Tokens order side effects and hold no data.
DTYPE_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8, "f8e3m4": 8,
    "f8e8m0fnu": 8, "f4e2m1fn": 4, "token": 0,
}  # fmt: skip

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
            "If your compiler is another version, install that one; otherwise preflight/ has to be extended"
        )


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type. in_hbm: neither a scalar nor in the chip's fast memory, S(1)."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * self.itemsize)

    @property
    def itemsize(self) -> float:
        """Bytes of an element."""
        return DTYPE_BITS[self.dtype] / 8


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

    @property
    def tuple_index(self) -> int:
        """Which element of a tuple a `get-tuple-element` takes. Raises UnknownHloError for anything else."""
        match = re.search(r"index=(\d+)", self.attributes)
        if self.opcode != "get-tuple-element" or not match:
            raise UnknownHloError("element of a tuple", str(self))
        return int(match.group(1))

    def __str__(self) -> str:
        """Where it is, for error messages."""
        return f"%{self.name} in %{self.computation}" + (f" ({self.op_name})" if self.op_name else "")


def read_instruction(line: str, computation: str) -> Instruction:
    """One line of a computation. Raises UnknownHloError if it cannot be read."""
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
