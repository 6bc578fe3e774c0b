"""AdamW and Muon, their learning-rate schedule, and which weights decay."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mythos_jax.config import TrainingConfig

# The parameters of an exit gate.
GATE = frozenset({"halt_kernel", "halt_bias"})

# Parameters that are not matrices of the network: norm gains and LoRA scales, biases, the injection's dynamics.
NO_DECAY = frozenset({"scale", "q_bias", "k_bias", "v_bias", "halt_bias", "log_a", "log_dt", "dt_bias", "b"})

# Muon updates the matrices between hidden activations; for each layout of axes, those it treats as input and output.
# All other weights (embeddings, heads with one output, gates with few channels) go to AdamW. Experts have a leading
# axis, over which Muon is vectorised.
_HEADS_OUT = MuonDimensionNumbers((0,), (1, 2))  # [D, H, K]
_HEADS_IN = MuonDimensionNumbers((0, 1), (2,))  # [H, K, D]
_PLAIN = MuonDimensionNumbers((0,), (1,))
_EXPERTS = MuonDimensionNumbers((1,), (2,))  # [E, D, F]


def schedule(config: TrainingConfig, peak: float) -> optax.Schedule:
    """The learning rate by step: linear from peak / (warmup_steps + 1) to the peak, then `config.schedule`."""
    warmup, fraction = config.warmup_steps, config.final_learning_rate_fraction
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), fraction)
    elif config.schedule == "wsd":
        begin = decay_start(config) - warmup
        after = optax.linear_schedule(peak, peak * fraction, config.decay_steps, transition_begin=begin)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    # Not from zero: the first step would change nothing.
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def decay_start(config: TrainingConfig) -> int:
    """The step at which `wsd` starts to decay; never before the end of the warm-up."""
    return max(config.warmup_steps, max(config.steps, config.warmup_steps + 1) - config.decay_steps)


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101), or Muon (Jordan et al., 2024) for the layers' matrices
    and AdamW for the rest. Weight decay is decoupled and acts on matrices only. Weights that are not trained have no
    state."""
    adamw = optax.adamw(
        schedule(config, config.learning_rate),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    update = adamw
    if config.optimizer == "muon":
        muon = optax.chain(
            scale_by_muon(weight_dimension_numbers=_dimension_numbers),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule(config, config.muon_learning_rate)),
        )
        update = optax.multi_transform({"muon": muon, "adamw": adamw}, optimizer_groups)
    optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clip or float("inf")), update)
    if not trains_gate_alone(config):
        return optimizer
    groups = lambda params: map_trained(config, lambda _: "trained", lambda _: "frozen", params)  # noqa: E731
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, groups)


def trains_gate_alone(config: TrainingConfig) -> bool:
    return config.objectives.exit_loss == "gain"


def map_trained(config: TrainingConfig, trained: Callable[..., Any], frozen: Callable[..., Any], *params: Any) -> Any:
    """Maps weights that training changes with one function, and those that it leaves as they are with the other."""

    def mapped(path: tuple[Any, ...], *leaves: Any) -> Any:
        is_trained = not trains_gate_alone(config) or path_names(path)[-1] in GATE
        return (trained if is_trained else frozen)(*leaves)

    return jax.tree_util.tree_map_with_path(mapped, *params)


def decay_mask(params: Any) -> Any:
    """A tree of bools: true for the weights that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_names(path)[-1] not in NO_DECAY, params)


def optimizer_groups(params: Any) -> Any:
    """A tree of "muon" and "adamw": which of the two updates each weight when `optimizer` is muon."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "adamw" if _muon_axes(path_names(path)) is None else "muon", params
    )


def path_names(path: tuple[Any, ...]) -> list[str]:
    """The dictionary keys on a tree path, without the boxes that hold partition names."""
    return [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]


def _dimension_numbers(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _muon_axes(path_names(path)), params)


def _muon_axes(names: list[str]) -> MuonDimensionNumbers | None:
    """The axes of the Muon weight at this path; None for a weight that AdamW updates."""
    *parents, last = names
    parent = parents[-1] if parents else ""
    if parent == "moe":
        return _EXPERTS
    if last == "kv_up" or parent == "q_up":
        return _HEADS_OUT
    if last != "kernel" or parent in ("router", "lora"):
        return None
    if parents[-2:-1] == ["attention"]:
        return {"out": _HEADS_IN, "q_down": _PLAIN, "kv_down": _PLAIN}.get(parent, _HEADS_OUT)
    return None if "lora" in parents else _PLAIN
