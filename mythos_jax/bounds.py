"""What a field of a config may be beyond its type: markers for `Annotated`, which typed.py reads."""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Ge:
    """The value is at least `limit`."""

    limit: float

    def allows(self, value: float) -> bool:
        return value >= self.limit

    def describe(self, noun: str) -> str:
        return f"{noun} >= {self.limit}"


@dataclass(frozen=True)
class Gt:
    """The value is greater than `limit`."""

    limit: float

    def allows(self, value: float) -> bool:
        return value > self.limit

    def describe(self, noun: str) -> str:
        return f"{noun} > {self.limit}"


@dataclass(frozen=True)
class Between:
    """The value is in an interval; square brackets include an end, round ones exclude it. noun: what it is called."""

    low: float
    high: float
    ends: Literal["[]", "[)", "(]", "()"] = "[]"
    noun: str = ""

    def allows(self, value: float) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return above and below

    def describe(self, noun: str) -> str:
        if noun.startswith("an integer") or noun == "integers":
            return f"{noun} from {self.low} to {self.high}"
        return f"{self.noun or noun} in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


@dataclass(frozen=True)
class OneOf:
    """The text is one of these words. Unlike a `Literal`, the list may grow while a program runs."""

    words: list[str]

    def allows(self, value: str) -> bool:
        return value in self.words

    def describe(self, noun: str) -> str:
        return ", ".join(self.words)


@dataclass(frozen=True)
class Or:
    """One value that is allowed although it is out of bounds; `meaning` says what it stands for."""

    value: float
    meaning: str


@dataclass(frozen=True)
class Formerly:
    """The field had another name in an earlier version. note: what users of that name should know.

    Giving the earlier name is an error that names the new one. Stored configs are upgraded instead (see `upgrade`).
    """

    name: str
    note: str = ""


@dataclass(frozen=True)
class IsPath:
    """The text is a path: `~` and environment variables in it are expanded when a config is read."""


@dataclass(frozen=True)
class Wide:
    """The integer may be larger than 32 bits hold; without this or a `Between`, it may not."""


PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Seed = Annotated[int, Between(0, 2**32 - 1)]  # jax takes the lower 32 bits of a seed
PathText = Annotated[str, IsPath()]
