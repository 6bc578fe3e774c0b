"""Names of tensors without what PyTorch's wrappers put into them: torch.compile, DDP, FSDP, DeepSpeed, Lightning."""

from collections.abc import Callable, Iterable
from pathlib import Path

from mythos_jax.errors import ConfigError

# Parts of a name, at any depth, that stand for a wrapper around what follows. No format has modules of these names.
WRAPPERS = (
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_original_module",
)
LIGHTNING = "model."  # in front of every name; but Llama's own names begin so, too


def unwrap(names: Iterable[str], is_known: Callable[[set[str]], bool], path: Path) -> tuple[dict[str, str], list[str]]:
    """Each stored name by what it is without wrappers, and the wrappers that were taken off.

    is_known: whether names are those of a format. Raises ConfigError if two tensors get the same name.
    """
    stored: dict[str, str] = {}
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        inner = ".".join(part for part in parts if part not in WRAPPERS)
        found |= dict.fromkeys(f"{part}." for part in parts if part in WRAPPERS)
        if inner in stored:
            raise ConfigError(f"{path}: holds both {stored[inner]} and {name}, allowed: one of them")
        stored[inner] = name
    candidate, depth = stored, 0
    while candidate and not is_known(set(candidate)) and all(name.startswith(LIGHTNING) for name in candidate):
        candidate, depth = {name.removeprefix(LIGHTNING): original for name, original in candidate.items()}, depth + 1
    if depth and is_known(set(candidate)):
        return candidate, [*found, LIGHTNING]
    return stored, list(found)
