"""JSON that a user's file may hold, and numbers that JSON has no word for."""

import json
import math
from typing import Any


def parse_json(text: str | bytes, unique_keys: bool = False) -> Any:
    """The value in a JSON text; bytes are UTF-8.

    Raises ValueError for anything else, also for values nested so deeply that the parser gives up with RecursionError,
    and with `unique_keys` for an object that has a key twice, of which Python keeps the last.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def without_nan(value: Any) -> Any:
    """The same dicts and lists with None, which JSON writes as null, for every NaN and infinity."""
    if isinstance(value, dict):
        return {name: without_nan(x) for name, x in value.items()}
    if isinstance(value, list):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key} is given twice")
        values[key] = value
    return values
