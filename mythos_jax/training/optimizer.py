"""AdamW and Muon, their schedule, and which weights decay."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mythos_jax.config import TrainingConfig

# Everything that is no matrix of the network: norm gains and LoRA scales, biases, the injection's dynamics.
NO_DECAY = frozenset({"scale", "q_bias", "k_bias", "halt_bias", "log_a", "log_dt", "dt_bias", "b"})

# Weights that are matrices between hidden activations, and the axes of each that Muon takes as input and output; the
# others (embeddings, heads of one output, gates of few channels) go to AdamW. Experts have a leading axis of their own.
_HEADS_OUT = MuonDimensionNumbers((0,), (1, 2))  # [D, H, K]
_HEADS_IN = MuonDimensionNumbers((0, 1), (2,))  # [H, K, D]
_PLAIN = MuonDimensionNumbers((0,), (1,))
_EXPERTS = MuonDimensionNumbers((1,), (2,))  # [E, D, F]


def schedule(config: TrainingConfig, peak: float) -> optax.Schedule:
    """Linear from peak / (warm-up + 1) at step 0 to the peak, then as `config.schedule` says."""
    warm, final = config.warmup_steps, peak * config.final_learning_rate_fraction
    rest = max(config.steps - warm, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_learning_rate_fraction)
    elif config.schedule == "wsd":
        down = max(round(config.decay_fraction * config.steps), 1)
        after = optax.linear_schedule(peak, final, down, transition_begin=max(rest - down, 0))
    else:
        after = optax.constant_schedule(peak)
    if not warm:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / (warm + 1), peak, warm), after], [warm])


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101), or Muon (Jordan et al., 2024) for the layers' matrices
    and AdamW for the rest. Weight decay is decoupled and acts on matrices only."""
    adamw = optax.adamw(
        schedule(config, config.learning_rate),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    update = adamw
    if config.optimizer == "muon":
        muon = optax.chain(
            scale_by_muon(weight_dimension_numbers=_dimension_numbers),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule(config, config.muon_learning_rate)),
        )
        update = optax.multi_transform({"muon": muon, "adamw": adamw}, optimizer_groups)
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip or float("inf")), update)


def decays(params: Any) -> Any:
    """A tree of bools: true for weights that weight decay pulls to zero."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_names(path)[-1] not in NO_DECAY, params)


def optimizer_groups(params: Any) -> Any:
    """A tree of "muon" and "adamw": who moves each weight when `optimizer` is muon."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "adamw" if _muon_axes(path_names(path)) is None else "muon", params
    )


def path_names(path: tuple[Any, ...]) -> list[str]:
    """The dictionary keys on a tree path (boxes of partition names, where there are any, left out)."""
    return [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]


def _dimension_numbers(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _muon_axes(path_names(path)), params)


def _muon_axes(names: list[str]) -> MuonDimensionNumbers | None:
    """The axes of a Muon weight, told by its path; None for AdamW's."""
    *above, last = names
    parent = above[-1] if above else ""
    if parent == "moe":
        return _EXPERTS
    if last == "kv_up" or parent == "q_up":
        return _HEADS_OUT
    if last != "kernel" or parent in ("router", "lora"):
        return None
    if above[-2:-1] == ["attention"]:
        return {"out": _HEADS_IN, "q_down": _PLAIN, "kv_down": _PLAIN}.get(parent, _HEADS_OUT)
    return None if "lora" in above else _PLAIN
