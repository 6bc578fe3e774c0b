"""Which parameters a run trains, and by which factors their learning rates differ."""

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from mythos_jax.config import Config
from mythos_jax.model.low_rank import PARTS, target_paths
from mythos_jax.model.names import frozen_paths, parameter_paths, select
from mythos_jax.typed import check_field


def rate_factors(config: Config) -> dict[str, float]:
    """The factor on the learning rate of each parameter that `training.learning_rate_factors` has a name for, by its
    dotted path. Where several names stand for a parameter, the last of them counts.

    Low-rank weights go by the names of the matrices that they are beside.

    Raises ConfigError: a name stands for no parameter, or for frozen ones alone.
    """
    field, lora = "training.learning_rate_factors", config.training.lora
    frozen = frozen_paths(config)
    if lora.rank:
        frozen = frozenset(parameter_paths(config.model)) - set(target_paths(config.model, lora))
    factors: dict[str, float] = {}
    for name, factor in config.training.learning_rate_factors.items():
        paths = select(config.model, [name], field)
        check_field(not paths <= frozen, f"{field} {name}", factor, "names of parameters that are not frozen")
        factors |= dict.fromkeys(paths, factor)
    if lora.rank:
        return {f"{path}.{part}": factor for path, factor in factors.items() for part in PARTS}
    return factors


def trained_part(params: Any, frozen: frozenset[str]) -> Any:
    """The parameters without those that are frozen: a nested dict as theirs, with fewer entries."""
    if not frozen:
        return params
    flat = flatten_dict(params, sep=".")
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in frozen}, sep=".")


def with_part(params: Any, part: Any) -> Any:
    """The parameters with other values for some of them, as `trained_part` has them."""
    return unflatten_dict(flatten_dict(params, sep=".") | flatten_dict(part, sep="."), sep=".")
