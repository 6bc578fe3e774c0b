"""JSON that a user's file may hold."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text; bytes are UTF-8.

    Raises ValueError for anything else, also for values nested so deeply that the parser gives up with RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
