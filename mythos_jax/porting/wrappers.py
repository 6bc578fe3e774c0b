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
# The usual attribute of Lightning's modules, in front of every name; but Llama's own names begin so, too.
LIGHTNING = "model"
DEEPEST = 4  # attributes in front of a model's names

Names = dict[str, str]  # the stored name by what it is without wrappers


def unwrap(
    names: Iterable[str], is_known: Callable[[set[str]], bool], path: Path
) -> tuple[Names, list[str], list[str]]:
    """The stored names by what they are without wrappers, the wrappers, and the attributes whose tensors were left out.

    If the names are those of a format only behind an attribute, such as Lightning's `model.`, that is a wrapper, too;
    tensors of a second such model, such as an average, are left out. is_known: whether names are those of a format.
    Raises ConfigError if two tensors get the same name.
    """
    stored: Names = {}
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        inner = ".".join(part for part in parts if part not in WRAPPERS)
        found |= dict.fromkeys(f"{part}." for part in parts if part in WRAPPERS)
        if inner in stored:
            raise ConfigError(f"{path}: holds both {stored[inner]} and {name}, allowed: one of them")
        stored[inner] = name
    model, attributes, left = _behind_attributes(stored, is_known)
    return model, [*found, *attributes], left


def _behind_attributes(stored: Names, is_known: Callable[[set[str]], bool]) -> tuple[Names, list[str], list[str]]:
    """As `unwrap`, for names without wrappers; the names as they are if no attribute leads to a format's."""
    current, attributes = stored, dict[str, None]()
    for _ in range(DEEPEST):
        if is_known(set(current)):
            break
        groups: dict[str, Names] = {}
        for name, original in current.items():
            attribute, dot, rest = name.partition(".")
            if dot:
                groups.setdefault(attribute, {})[rest] = original
        models = [attribute for attribute, group in groups.items() if is_known(set(group))]
        if models:
            chosen = LIGHTNING if LIGHTNING in models else models[0]
            if len(models) > 1 and chosen != LIGHTNING:
                return stored, [], []
            others = {n: original for n, original in current.items() if n.partition(".")[0] not in models}
            left = [f"{attribute}." for attribute in models if attribute != chosen]
            return {**others, **groups[chosen]}, [*attributes, f"{chosen}."], left
        if len(groups) != 1:
            return stored, [], []
        ((attribute, current),) = groups.items()
        attributes[f"{attribute}."] = None
    return (current, list(attributes), []) if is_known(set(current)) else (stored, [], [])
