"""AdamW and Muon, their learning-rate schedule, and which weights decay."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mythos_jax.config import TrainingConfig
from mythos_jax.model.low_rank import PARTS

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


def make_optimizer(config: TrainingConfig, factors: Mapping[str, float] | None = None) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101), or Muon (Jordan et al., 2024) for the layers' matrices
    and AdamW for the rest. Weight decay is decoupled and acts on matrices only.

    factors: by dotted path, what the learning rate of a parameter is multiplied by (`groups.rate_factors`).
    """
    adamw = optax.adamw(
        schedule(config, config.learning_rate),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=config.optimizer_dtype,
    )
    if config.optimizer_dtype == "bfloat16":
        adamw = _narrow_second_moment(adamw, config.seed)
    update = adamw
    if config.optimizer == "muon":
        orthogonal = scale_by_muon(weight_dimension_numbers=_dimension_numbers, mu_dtype=config.optimizer_dtype)
        muon = optax.chain(
            _scaled(orthogonal, _shape_factor) if config.muon_shape_scaling else orthogonal,
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule(config, config.muon_learning_rate)),
        )
        update = optax.multi_transform({"muon": muon, "adamw": adamw}, optimizer_groups)
    optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clip or float("inf")), update)
    if not factors:
        return optimizer
    return _scaled(optimizer, lambda path, _: factors.get(".".join(path_names(path)), 1.0))


def _narrow_second_moment(adamw: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """AdamW that stores its second moment in bfloat16.

    A step changes it by a small part of itself, 1 - b2 of it at most, which rounding to nearest would lose for a b2
    close to 1: it would never fall again. So it is rounded up or down at random, right on average.
    """

    def stored(state: Any, narrow: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
        def of(part: Any) -> Any:
            if not isinstance(part, optax.ScaleByAdamState):
                return part
            leaves, tree = jax.tree.flatten(part.nu)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), part.count), max(len(leaves), 1))
            return part._replace(nu=jax.tree.unflatten(tree, map(narrow, leaves, keys)))

        return jax.tree.map(of, state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))

    def init(params: Any) -> Any:
        return stored(adamw.init(params), lambda nu, _: nu.astype(jnp.bfloat16))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = stored(state, lambda nu, _: nu.astype(jnp.float32))
        updates, state = adamw.update(gradients, state, params)
        return updates, stored(state, rounded_at_random)

    return optax.GradientTransformation(init, update)


def rounded_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 as one of the two bfloat16 numbers around it, each as likely as it is near."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _scaled(
    transform: optax.GradientTransformation, factor_of: Callable[[tuple[Any, ...], jax.Array], float]
) -> optax.GradientTransformation:
    """The transformation with each update multiplied by `factor_of` its path and shape. The state is the same with and
    without the factors, so a resume may change them."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = transform.update(gradients, state, params)
        return jax.tree_util.tree_map_with_path(lambda path, x: x * factor_of(path, x), updates), state

    return optax.GradientTransformation(transform.init, update)


def _shape_factor(path: tuple[Any, ...], update: jax.Array) -> float:
    """sqrt(outputs / inputs) of a Muon matrix with more outputs than inputs, else 1 (Jordan's code)."""
    axes = _muon_axes(path_names(path))
    assert axes is not None, "Muon updates matrices only"
    inputs, outputs = (math.prod(update.shape[axis] for axis in group) for group in axes)
    return max(1.0, outputs / inputs) ** 0.5


def decay_mask(params: Any) -> Any:
    """A tree of bools: true for the weights that weight decay applies to."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = path_names(path)
        return _is_low_rank(names) or names[-1] not in NO_DECAY

    return jax.tree_util.tree_map_with_path(decays, params)


def optimizer_groups(params: Any) -> Any:
    """A tree of "muon" and "adamw": which of the two updates each weight when `optimizer` is muon."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "adamw" if _muon_axes(path_names(path)) is None else "muon", params
    )


def path_names(path: tuple[Any, ...]) -> list[str]:
    """The dictionary keys on a tree path, without the boxes that hold partition names."""
    return [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]


def _is_low_rank(names: list[str]) -> bool:
    """Whether a path is that of a low-rank weight: below the name of the matrix that it is beside."""
    return names[-1] in PARTS and names[-2:-1] in (["kernel"], ["kv_up"])


def _dimension_numbers(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _muon_axes(path_names(path)), params)


def _muon_axes(names: list[str]) -> MuonDimensionNumbers | None:
    """The axes of the Muon weight at this path; None for a weight that AdamW updates."""
    *parents, last = names
    if _is_low_rank(names):  # a has the inputs of its matrix, b the outputs
        inputs, outputs = (len(axes) for axes in _muon_axes(parents) or _PLAIN)
        if last == "a":
            return MuonDimensionNumbers(tuple(range(inputs)), (inputs,))
        return MuonDimensionNumbers((0,), tuple(range(1, outputs + 1)))
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
