"""Names of parameters, as users write them: to freeze some, or to train them in another way.

A name is a part of the model (`PARTS`), or a run of complete components of a parameter's dotted path, such as `q`,
`attention.q`, `prelude_0`, or `recurrence.cell.layer_3`; `*` stands for any characters of one component.
"""

import difflib
import re
from collections.abc import Iterable
from functools import cache

from flax.traverse_util import flatten_dict

from mythos_jax.config import Config, ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.typed import check_field, shown

# The parts of a model. The first five hold every parameter once, except that a tied table is the embedding and the
# head; the others cut across them. Patterns of whole paths; a dot ends a component.
PARTS = {
    "embedding": r"embedding|value_table_\d+",
    "prelude": r"prelude_.*",
    "loop": r"recurrence\..*",
    "coda": r"coda_.*|readout_projection\..*|final_norm\..*",
    "head": r"unembedding",  # of a tied model: `embedding`
    "norms": r"(.*\.)?[^.]*norm\.scale",
    "injection": r"recurrence\.cell\.injection\..*",
    "gate": r"recurrence\.cell\.halt_(kernel|bias)",
}

# What other libraries call our parameters: used for hints only.
_ELSEWHERE = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.out",
    "self_attn": "attention",
    "gate_proj": "feed_forward.gate",
    "up_proj": "feed_forward.up",
    "down_proj": "feed_forward.down",
    "mlp": "feed_forward",
    "experts": "moe",
    "embed_tokens": "embedding",
    "wte": "embedding",
    "lm_head": "head",
    "adapter": "injection",
    "exit_gate": "gate",
}


def select(config: ModelConfig, names: Iterable[str], field: str) -> frozenset[str]:
    """The dotted paths below `params` of the parameters that any of the names stands for.

    field: the config field that the names come from, for errors. A word in `PARTS` is that part, even if it is also a
    component of a path. Raises ConfigError, with the nearest names, for a name that stands for no parameter.
    """
    paths = parameter_paths(config)
    found: set[str] = set()
    for name in names:
        pattern = _pattern(config, name)
        matches = [path for path in paths if pattern.fullmatch(path)]
        if not matches:
            raise ConfigError(_no_match(config, name, field))
        found.update(matches)
    return frozenset(found)


def frozen_paths(config: Config) -> frozenset[str]:
    """The dotted paths of the parameters that training leaves as they are: those of `training.frozen`, and of a run
    that trains an exit gate alone all others.

    Raises ConfigError: a name stands for no parameter, nothing is left to train, or not what an objective trains.
    """
    names, everything = config.training.frozen, set(parameter_paths(config.model))
    frozen = select(config.model, names, "training.frozen")
    if config.training.objectives.exit_loss == "gain":
        frozen |= everything - select(config.model, ["gate"], "training.objectives.exit_loss")
    check_field(frozen != everything, "training.frozen", names, "names that leave something to train")
    objectives = config.training.objectives
    for field in ("exit_loss", "ponder_cost", "ponder_prior"):
        if getattr(objectives, field) not in ("none", 0) and select(config.model, ["gate"], "") <= frozen:
            allowed = f"names that leave the gate to training.objectives.{field}, which trains it"
            check_field(False, "training.frozen", names, allowed)
    return frozen


@cache
def parameter_paths(config: ModelConfig) -> tuple[str, ...]:
    """The dotted paths of all parameters of a model, in the order of its tree."""
    return tuple(flatten_dict(abstract_variables(config)["params"], sep="."))


def _pattern(config: ModelConfig, name: str) -> re.Pattern[str]:
    """What the whole path of a parameter must match to be meant by a name."""
    if name == "head" and config.tied_embedding:
        return re.compile("embedding")
    if name in PARTS:
        return re.compile(PARTS[name])
    words = r"[^.]*".join(map(re.escape, name.split("*")))
    return re.compile(rf"(.*\.)?({words})(\..*)?")


def _no_match(config: ModelConfig, name: str, field: str) -> str:
    paths = parameter_paths(config)
    parts = [part for part in PARTS if any(_pattern(config, part).fullmatch(path) for path in paths)]
    allowed = f"{', '.join(parts)}, or components of a parameter's path"
    near = _nearest(name, parts, paths)
    return f"{field}: got {shown(name)}, allowed: {allowed}" + (f"; nearest: {', '.join(near)}" if near else "")


def _nearest(name: str, parts: list[str], paths: Iterable[str]) -> list[str]:
    """Up to three names that stand for parameters and are the most like a name that does not."""
    runs = {
        ".".join(words[i:j])
        for words in (path.split(".") for path in paths)
        for j in range(len(words) + 1)
        for i in range(j)
    }
    known = [*parts, *sorted(runs - PARTS.keys())]
    means = {word: ours for word, ours in _ELSEWHERE.items() if ours in known} | {word: word for word in known}
    near = difflib.get_close_matches(name, means, n=6, cutoff=0.6)
    return list(dict.fromkeys(means[word] for word in near))[:3]
