"""Pickles, read without executing anything: no name in one is imported, and nothing is called.

Plain data become plain values. Any other object becomes an `Inert`, which holds what the pickle says about it. Time and
memory grow with the size of the pickle and with nothing that is written in it.
"""

import pickletools
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from mythos_jax.errors import one_line

LONGEST_KEY = 8  # elements of a tuple that is the key of a dictionary

PUSHED = frozenset(  # opcodes that push their argument, a number, text or bytes
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and not opcode.stack_before and opcode.stack_after not in ([], [pickletools.anyobject])
)
NEW: dict[str, Callable[[], Any]] = {  # opcodes that push a new value; sets are lists here
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
SMALL_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Functions that make an object of the class that is their first argument.
MAKERS = ("copyreg.__newobj__", "copyreg._reconstructor", "copy_reg._reconstructor")


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Inert:
    """What a pickle says about an object that is not plain data.

    maker: the name of its class, or of the function that makes it; seldom something else that the pickle would call.
    state: of `__setstate__`, most often a dict of attributes. items, entries: what it would append and set.
    """

    maker: Any
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    @property
    def attributes(self) -> Mapping[Any, Any]:
        """Its attributes, and its entries if it is a kind of dict. Nothing is copied."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # what `__dict__` and `__slots__` hold
            return ChainMap(self.entries, _dict(state[1]), _dict(state[0]))
        return ChainMap(self.entries, _dict(state)) if self.entries else _dict(state)

    @property
    def made_by(self) -> str:
        """The name of its maker, on one line."""
        return one_line(self.maker, 80) if isinstance(self.maker, Name) else "an object of the file"


Call = Callable[[Name, tuple[Any, ...]], Any]  # what stands for the result of a function with these arguments


def unpickle(file: BinaryIO, call: Call, persistent: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the position of `file`, which is left behind the pickle.

    call: what stands for a function's result; persistent: what stands for an id that the program resolves itself.
    Raises any exception if the pickle is malformed.
    """
    machine = _Machine(call, persistent)
    for opcode, argument, _ in pickletools.genops(file):
        machine.execute(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(self, call: Call, persistent: Callable[[Any], Any]):
        self.call, self.persistent = call, persistent
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # a stack for each mark
        self._memo: dict[int, Any] = {}

    def execute(self, opcode: str, argument: Any) -> None:
        if opcode in PUSHED:
            self.stack.append(argument)
        elif opcode in NEW:
            self.stack.append(NEW[opcode]())
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif opcode in ("PROTO", "FRAME", "STOP"):
            pass
        elif opcode in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD"):
            self._object(opcode, argument)
        elif opcode in ("PERSID", "BINPERSID"):
            self.stack.append(self.persistent(argument if opcode == "PERSID" else self.stack.pop()))
        else:
            self._container(opcode)

    def _container(self, opcode: str) -> None:
        """Marks, tuples, lists, dicts and sets."""
        stack = self.stack
        if opcode == "MARK":
            self._below.append(stack)
            self.stack = []
        elif opcode in SMALL_TUPLES:
            count = SMALL_TUPLES[opcode]
            if len(stack) < count:
                raise ValueError("its stack is empty")
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "APPEND":
            self._extend([stack.pop()])
        elif opcode == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set([key, value])
        elif opcode == "POP" and stack:
            stack.pop()
        elif opcode == "DUP":
            stack.append(stack[-1])
        elif opcode in ("TUPLE", "LIST", "FROZENSET", "DICT", "APPENDS", "ADDITEMS", "SETITEMS", "POP_MARK", "POP"):
            self._marked(opcode, self._pop_mark())
        else:  # EXT1 and the like name what only the writing program knows; NEXT_BUFFER is not in the file
            raise ValueError(f"opcode {opcode}")

    def _marked(self, opcode: str, items: list[Any]) -> None:
        """The opcodes that take everything above the last mark."""
        if opcode == "TUPLE":
            self.stack.append(tuple(items))
        elif opcode in ("LIST", "FROZENSET"):
            self.stack.append(items)
        elif opcode == "DICT":
            self.stack.append({})
            self._set(items)
        elif opcode in ("APPENDS", "ADDITEMS"):
            self._extend(items)
        elif opcode == "SETITEMS":
            self._set(items)

    def _object(self, opcode: str, argument: Any) -> None:
        """Names, and what is made of them."""
        stack = self.stack
        if opcode == "GLOBAL":
            stack.append(Name(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise ValueError("a name that is not text")
            stack.append(Name(module, name))
        elif opcode == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Inert):
                stack[-1].state = state
        elif opcode == "INST":
            items = self._pop_mark()
            self.stack.append(Inert(Name(*argument.split(" ", 1)), tuple(items)))
        elif opcode == "OBJ":
            items = self._pop_mark()
            self.stack.append(Inert(items[0], tuple(items[1:])))
        else:
            if opcode == "NEWOBJ_EX":
                stack.pop()  # arguments by name
            arguments, maker = stack.pop(), stack.pop()
            if not isinstance(arguments, tuple):
                raise ValueError("arguments that are not a tuple")
            if opcode == "REDUCE" and isinstance(maker, Name) and str(maker) not in MAKERS:
                stack.append(self.call(maker, arguments))
            elif opcode == "REDUCE" and arguments and isinstance(maker, Name):
                stack.append(Inert(arguments[0], arguments[1:]))
            else:
                stack.append(Inert(maker, arguments))

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target = target.items
        if not isinstance(target, list):
            raise ValueError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target = target.entries
        if not isinstance(target, dict):
            raise ValueError(f"sets an entry of a {type(target).__name__}")
        target.update({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})


def _key(value: Any) -> Any:
    """The key of a dictionary: the value if it is quickly hashed, else an object that nothing equals."""
    parts = value if isinstance(value, tuple) else (value,)
    return value if len(parts) <= LONGEST_KEY and all(map(_is_quick, parts)) else Inert(None, (value,))


def _is_quick(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, float | str | bytes | Name | Inert)


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
