"""Reading the `config.json` of a reference implementation: its own field names, checked one by one."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.typed import nearest_name

_REQUIRED = object()


class Fields:
    """The fields of one file. Every error names `where` and the field.

    known: the names that this format may have. Hugging Face adds fields of its own, so unknown names are ignored,
    unless one is so similar to a known name that it must be a misspelling.
    """

    def __init__(self, given: Mapping[str, Any], where: str, known: Iterable[str]):
        self.given, self.where, self.known = given, where, set(known)
        self._unknown = [name for name in given if name not in self.known]
        for name in self._unknown:
            near = nearest_name(name, self.known - set(given), cutoff=0.75)
            if near:
                raise ConfigError(f"{where}: {one_line(name)}: unknown field; did you mean {near}?")

    def integer(self, name: str, default: Any = _REQUIRED, low: int = 0, high: int = 2**31 - 1) -> int:
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        self._check(name, value, ok, "an integer" if isinstance(value, str) else f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._get(name, default)
        self._check(name, value, isinstance(value, int | float) and not isinstance(value, bool), "a number")
        return float(value)

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._get(name, default)
        self._check(name, value, isinstance(value, bool), "true or false")
        return value

    def choice(self, name: str, allowed: Collection[str], default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        self._check(name, value, isinstance(value, str) and value in allowed, ", ".join(allowed))
        return value

    def section(self, name: str, known: Iterable[str]) -> "Fields":
        """The fields of an object inside; none if it is absent or null."""
        value = self.given.get(name) or {}
        self._check(name, value, isinstance(value, Mapping), "an object")
        return Fields(value, f"{self.where}: {name}", known)

    def sequence(self, name: str) -> Sequence[Any]:
        """A list; empty if it is absent or null."""
        value = self.given.get(name) or ()
        self._check(name, value, isinstance(value, list | tuple), "a list")
        return value

    def expect(self, values: Mapping[str, Any]) -> None:
        """Each of these fields must be absent or have this value, since no other is supported."""
        for name, expected in values.items():
            value = self.given.get(name, expected)
            same_kind = isinstance(value, bool) == isinstance(expected, bool)  # 0 == False, but means another thing
            self._check(name, value, value == expected and same_kind, repr(expected))

    def expect_off(self, names: Iterable[str]) -> None:
        """Each of these fields must be absent, or null, false, 0 or empty: what it turns on is not supported."""
        for name in names:
            self._check(name, self.given.get(name), not self.given.get(name), "null or false")

    def refuse_unknown(self) -> None:
        """Raises ConfigError for a field that this format does not have, unless it is null, false, 0 or empty."""
        for name in self._unknown:
            if self.given[name]:
                raise ConfigError(
                    f"{self.where}: {one_line(name)}: unknown field, got {self.given[name]!r}; it may change the model"
                )

    def _get(self, name: str, default: Any) -> Any:
        value = self.given.get(name, default)
        if value is _REQUIRED:
            near = nearest_name(name, self._unknown, cutoff=0.6)
            hint = f"; is it {near}?" if near else ""
            raise ConfigError(f"{self.where}: {name}: missing{hint}")
        return value

    def _check(self, name: str, value: Any, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"{self.where}: {one_line(name)}: got {value!r}, allowed: {allowed}")
