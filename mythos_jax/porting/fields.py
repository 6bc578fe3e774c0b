"""Reading a reference's `config.json`: its own field names, checked, with errors that name the field."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from mythos_jax.errors import ConfigError

MISSING = object()


class Fields:
    """The fields of one file. `where` is named in errors; `known` are the names that this family may have.

    A name that is no known field but nearly one is an error; other unknown names are left alone, since Hugging Face
    adds its own.
    """

    def __init__(self, given: Mapping[str, Any], where: str, known: Iterable[str]):
        self.given, self.where, self.known = given, where, set(known)
        self._strange = [name for name in given if name not in self.known]
        for name in self._strange:
            near = difflib.get_close_matches(name, self.known - set(given), n=1, cutoff=0.75)
            if near:
                raise ConfigError(f"{where}: {name}: unknown field; did you mean {near[0]}?")

    def integer(self, name: str, default: Any = MISSING) -> int:
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return self._checked(name, value, isinstance(value, int) and not isinstance(value, bool), "an integer")

    def number(self, name: str, default: Any = MISSING) -> float:
        value = self._get(name, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        return float(self._checked(name, value, ok, "a number"))

    def flag(self, name: str, default: Any = MISSING) -> bool:
        value = self._get(name, default)
        return self._checked(name, value, isinstance(value, bool), "true or false")

    def word(self, name: str, allowed: Iterable[str], default: Any = MISSING) -> str:
        value = self._get(name, default)
        return self._checked(name, value, value in allowed, ", ".join(allowed))

    def fixed(self, values: Mapping[str, Any]) -> None:
        """Fields that may be absent, but if present must have this value: nothing else is supported."""
        for name, value in values.items():
            got = self.given.get(name, value)
            self._checked(name, got, got == value and isinstance(got, bool) == isinstance(value, bool), repr(value))

    def _get(self, name: str, default: Any) -> Any:
        value = self.given.get(name, default)
        if value is MISSING:
            near = difflib.get_close_matches(name, self._strange, n=1)
            hint = f"; is {near[0]} it?" if near else ""
            raise ConfigError(f"{self.where}: {name}: missing{hint}")
        return value

    def _checked(self, name: str, value: Any, ok: bool, allowed: str) -> Any:
        if not ok:
            raise ConfigError(f"{self.where}: {name}: got {value!r}, allowed: {allowed}")
        return value
