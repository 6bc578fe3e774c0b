"""The optional key, and which pages of the web may ask from a browser."""

import hmac
import ipaddress
import os
from pathlib import Path

from starlette.datastructures import Headers

from mythos_jax.errors import ConfigError
from mythos_jax.server.errors import ApiError

KEY_VARIABLE = "MYTHOS_API_KEY"
_LONGEST = 4096


def read_key(file: str | None) -> str | None:
    """The key in a file, else in the environment; None if neither has one. Raises ConfigError."""
    if file is None:
        name, text = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
        if text is None:
            return None
    else:
        name = f"--api-key-file {file}"
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{name}: not text; allowed: a key on one line") from None
    key = text.strip()
    if not (key.isascii() and key.isprintable() and " " not in key and 0 < len(key) <= _LONGEST):
        raise ConfigError(f"{name}: allowed: a key of 1 to {_LONGEST} printable ASCII characters without spaces")
    return key


def require_key(headers: Headers, key: str | None) -> None:
    """Raises ApiError unless a request has the key, if there is one."""
    if key is None:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
    if scheme.lower() != "bearer" or not same:
        message = "no such API key" if given else "no API key; allowed: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key")


def require_local_name(headers: Headers) -> None:
    """Raises ApiError if a browser was led here by a name of some other site, which could then read the answers.

    For a server that only this machine reaches, and that has no key.
    """
    host = headers.get("host", "localhost")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower().rstrip(".") == "localhost":
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        allowed = "localhost or an address, unless the server has an API key"
        raise ApiError(403, f"host: got {host[:100]!r}, allowed: {allowed}", code="host") from None
