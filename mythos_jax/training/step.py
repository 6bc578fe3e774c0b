"""The state of training and the jitted step that replaces it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mythos_jax.config import (
    Config,
    TrainingConfig,
    backprop_loops,
    gathers_per_loop,
    has_static_depth,
    may_skip_loops,
)
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.apply import apply
from mythos_jax.model.gather import LOW_RANK, gather_loop_weights
from mythos_jax.model.layers import compute_dtype
from mythos_jax.model.likelihood import exit_losses, forward, token_loss
from mythos_jax.model.low_rank import fresh_low_rank
from mythos_jax.model.moe import balanced
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.names import frozen_paths
from mythos_jax.model.state import Output
from mythos_jax.processes import log0
from mythos_jax.runs.low_rank import model_variables
from mythos_jax.runs.state import Constants, Teacher, TrainState, trained_collection
from mythos_jax.sharding import abstract, constrain, initialise, replicate, use_mesh
from mythos_jax.training.compiler import Options, compiler_options, described
from mythos_jax.training.depth import draw_depths, loops_with_gradient, order_by_depth, truncated_forward
from mythos_jax.training.distillation import distilled
from mythos_jax.training.groups import rate_factors, trained_part, with_part
from mythos_jax.training.objectives import (
    Mean,
    TokenLosses,
    exit_objective,
    extra_objectives,
    token_mean,
    total_weight,
)
from mythos_jax.training.optimizer import make_optimizer, schedule

# Decay of the running mean of the loss, against which spikes are detected.
LOSS_MEMORY = 0.95

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """A fresh state drawn from the seed, each array made straight in its shards."""
    return initialise(_fresh_state(config), mesh, jax.random.key(config.training.seed))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and places of the state, for compiling ahead of time; the devices need not be there."""
    return abstract(_fresh_state(config), mesh, jax.eval_shape(jax.random.key, config.training.seed))


def _fresh_state(config: Config) -> Callable[[jax.Array], TrainState]:
    optimizer, frozen = make_optimizer(config.training), frozen_paths(config)

    def make(key: jax.Array) -> TrainState:
        variables = _fresh_variables(config, key)
        weights = variables[trained_collection(variables)]
        return TrainState(
            step=jnp.int32(0),
            variables=variables,
            optimizer=optimizer.init(trained_part(weights, frozen)),
            average=weights if config.training.ema_decay else None,
            loss_mean=jnp.float32(0),
            skipped=jnp.int32(0),
        )

    return make


def _fresh_variables(config: Config, key: jax.Array) -> dict[str, Any]:
    if config.training.lora.rank:
        return {LOW_RANK: fresh_low_rank(config.model, config.training.lora, key)}
    # The weights do not depend on the shape of the tokens, so the smallest call makes them.
    made = Mythos(config.model).init({"params": key, "state": key}, jnp.zeros((1, 1), jnp.int32))
    return {"balance": {}, **made}


Step = Callable[[TrainState, Batch, Constants], tuple[TrainState, Metrics]]


def make_train_step(config: Config, mesh: Mesh) -> Step:
    """`jitted_step` on a mesh."""
    options = compiler_options(config, mesh)
    if config.training.compiler != "default":
        nothing = f"no options are known for {mesh.devices.flat[0].device_kind}"
        log0(f"training.compiler {config.training.compiler}: {described(options) or nothing}")
    jitted = jitted_step(config, options)

    def run(state: TrainState, batch: Batch, constants: Constants) -> tuple[TrainState, Metrics]:
        with use_mesh(mesh):
            return jitted(state, batch, constants)

    return run


def jitted_step(config: Config, options: Options | None = None) -> Any:
    """The jitted step, (state, batch, constants) -> (state, metrics), to be called or lowered inside `use_mesh`. The
    state is donated, the constants are not. options: of the compiler (see `compiler_options`).

    Metrics, float32: loss (nats per token, weighted by the mask), learning_rate, gradient_norm, tokens (that have a
    weight), mean_loops, bad (whether this step was), skipped (updates left out so far, where bad steps are skipped),
    each objective that is on; for an exit gate that is trained also mean_exit, the mean loop that it exits after; with
    a teacher also distillation, KL(teacher || student) in nats per token; with a mixture of experts also expert_load
    [loop_layers, E], fractions that sum to 1 per layer, and load_imbalance, the largest fraction times E.
    """
    t = config.training
    optimizer, rate = make_optimizer(t, rate_factors(config)), schedule(t, t.learning_rate)
    frozen = frozen_paths(config)
    gradients_of = _make_gradients(config)

    def step(state: TrainState, batch: Batch, constants: Constants) -> tuple[TrainState, Metrics]:
        gradients, sums = gradients_of(state, batch, constants)
        gradient_norm = optax.tree.norm(gradients)
        loss = sums["nats"] / sums["weight"]
        # Clipping is part of the optimizer; the norm that is reported is the one before it.
        before = trained_part(state.variables[trained_collection(state.variables)], frozen)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, before)
        trained = optax.apply_updates(before, updates)
        metrics = {
            "loss": loss,
            "learning_rate": rate(state.step),
            "gradient_norm": gradient_norm,
            "tokens": (batch["mask"] != 0).sum(),
            "mean_loops": sums["loops"] / sums["weight"],
            **sums["extra"],
        }
        load = sums["expert_load"]
        if load is not None:
            fraction = load / jnp.maximum(load.sum(-1, keepdims=True), 1)
            metrics |= {"expert_load": fraction, "load_imbalance": fraction.max() * fraction.shape[-1]}
        new = TrainState(
            step=state.step + 1,
            variables=_balanced(_with_trained(state.variables, trained), load, t.balance_rate, frozen),
            optimizer=optimizer_state,
            average=state.average and _average(state.average, trained, t.ema_decay, frozen),
            loss_mean=jnp.where(state.step == 0, loss, LOSS_MEMORY * state.loss_mean + (1 - LOSS_MEMORY) * loss),
            skipped=state.skipped,
        )
        bad = _is_bad(t, state, loss, gradient_norm)
        metrics["bad"] = bad
        if t.bad_steps == "skip":
            # Everything but the step count stays as it was; the next step reads the next batch.
            kept = state.replace(step=new.step, skipped=state.skipped + 1)
            new = jax.tree.map(lambda a, b: jnp.where(bad, a, b), kept, new)
            metrics["skipped"] = new.skipped
        return new, replicate(metrics)

    return jax.jit(step, donate_argnums=0, compiler_options=options or None)


class Whole(NamedTuple):
    """Of the whole batch: the sum of its mask, and that of its rows' depths (None: all rows have the same)."""

    weight: jax.Array
    loops: jax.Array | None


# (parameters that train, state, constants, rows, index of the part, whole batch) -> loss and sums, or gradients and
# sums.
LossFunction = Callable[[Any, TrainState, Constants, Batch, jax.Array, Whole], tuple[Any, dict[str, Any]]]


def _make_loss(config: Config) -> LossFunction:
    """A part's share of the batch's mean loss, so that the shares of all parts add up to it; and sums over its rows."""
    model, t = Mythos(config.model, gather_per_loop=gathers_per_loop(config)), config.training

    def loss_of(
        trained: Any, state: TrainState, constants: Constants, part: Batch, part_index: jax.Array, whole: Whole
    ) -> tuple[jax.Array, dict[str, Any]]:
        # Nothing is differentiated for frozen parameters: they come from the state or are constants of the run.
        variables = model_variables(config, _with_trained(state.variables, trained), constants)
        if not model.gather_per_loop:
            # Inside the loss, so that the gradients of all loops add up before they are reduced over devices.
            dtype = compute_dtype(config.model)
            variables = gather_loop_weights(variables, abstract_variables(config.model), dtype)
        # A key of its own for each step and part: noise must not repeat, and a resumed run must draw it again.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(t.seed), state.step), part_index)
        # Divided by the weight of the whole batch, not of the part: parts may have different numbers of tokens.
        mean = token_mean(part["mask"], whole.weight)
        losses, out = _token_losses(config, model, variables, constants.teacher, part, state.step, key, mean)

        loss = mean(losses.minimised_BT)
        use = 1 / t.grad_accumulation_steps if whole.loops is None else part["loops"].sum() / whole.loops
        extra = extra_objectives(t.objectives, out.aux, mean, use)
        loss += sum(getattr(t.objectives, name) * value for name, value in extra.items())
        sums = {
            "nats": (losses.nats_BT * part["mask"]).sum(),
            "loops": (out.loops * part["mask"]).sum(),
            "expert_load": out.aux.expert_load,
            "extra": extra | losses.metrics,
        }
        return loss, sums

    return loss_of


def _token_losses(
    config: Config,
    model: Mythos,
    variables: Any,
    teacher: Teacher | None,
    part: Batch,
    step: jax.Array,
    key: jax.Array,
    mean: Mean,
) -> tuple[TokenLosses, Output]:
    """What each token contributes to the loss, and what the model returned. key: for models that start from noise."""
    objectives, rngs = config.training.objectives, {"state": key}
    # Where all rows of all steps run the same loops, depth is a constant and one scan runs them all.
    most, run = backprop_loops(config), forward
    if not has_static_depth(config):
        limit, skip = loops_with_gradient(config, step), may_skip_loops(config)
        run = partial(truncated_forward, backprop_loops=most, limit=limit, skip_idle=skip)
    loops = part.get("loops", most)
    if teacher is not None:
        out = apply(run, model, variables, part["tokens"], part.get("segment_ids"), loops, None, rngs=rngs)
        settings = config.training.distillation
        return distilled(settings, teacher, out.features, variables, part, key, mean), out
    if objectives.exit_loss == "none":
        loss_BT, out = token_loss(model, variables, part, loops=loops, rngs=rngs, run=run)
        return TokenLosses(loss_BT, loss_BT, {}), out
    run = partial(run, trace_states=True)
    loss_LBT, out = exit_losses(model, variables, part, loops=loops, rngs=rngs, run=run)
    return exit_objective(objectives, loss_LBT, out.aux, out.loops, mean), out


def _make_gradients(config: Config) -> Callable[[TrainState, Batch, Constants], tuple[Any, dict[str, Any]]]:
    """(state, batch, constants) -> gradients of the mean loss over the batch, and sums over it."""
    gradient, parts = jax.grad(_make_loss(config), has_aux=True), config.training.grad_accumulation_steps
    frozen = frozen_paths(config)

    def gradients(state: TrainState, batch: Batch, constants: Constants) -> tuple[Any, dict[str, Any]]:
        whole = Whole(total_weight(batch["mask"]), None)
        if not has_static_depth(config):
            # Drawn for the whole batch before it is split, so that a row's depth does not depend on the split.
            batch = {**batch, "loops": draw_depths(config, state.step, batch["tokens"].shape[0])}
            whole = whole._replace(loops=batch["loops"].sum())
            if parts > 1 and config.training.depth.sample_per == "sequence":
                order = order_by_depth(batch["loops"], parts)
                batch = jax.tree.map(lambda x: constrain(x[order], *("batch", "length")[: x.ndim]), batch)
        trained = trained_part(state.variables[trained_collection(state.variables)], frozen)
        if parts == 1:
            total, sums = gradient(trained, state, constants, batch, jnp.int32(0), whole)
        else:
            total, sums = _accumulated(partial(gradient, trained, state, constants), batch, whole, parts)
        return total, {**sums, "weight": whole.weight}

    return gradients


def _accumulated(
    gradient: Callable[[Batch, jax.Array, Whole], Any], batch: Batch, whole: Whole, n: int
) -> tuple[Any, dict[str, Any]]:
    """Gradients and sums of n parts of the batch, one after the other, which needs the memory of one part.

    gradient: (rows, index of the part, whole batch) -> gradients and sums.
    """
    # Part i takes rows i, i + n, i + 2 n, …: each device then splits the rows that it holds.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), batch)
    indices = jnp.arange(n)

    def of_part(index: jax.Array, rows: Batch) -> Any:
        return gradient(rows, index, whole)

    def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    first = jax.tree.map(lambda x: x[0], (indices, parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, *first))
    return jax.lax.scan(add, zeros, (indices, parts))[0]


def _is_bad(t: TrainingConfig, state: TrainState, loss: jax.Array, gradient_norm: jax.Array) -> jax.Array:
    """Whether the loss or the gradient is NaN or infinite, or the loss far above its running mean."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(gradient_norm))
    if t.spike_factor:
        # Not during warm-up: the running mean has yet to follow the first steep fall of the loss.
        bad |= (state.step > t.warmup_steps) & (loss > t.spike_factor * state.loss_mean)
    return bad


def _average(average: Any, trained: Any, decay: float, frozen: frozenset[str]) -> Any:
    """The moving average after one more step; that of frozen parameters keeps its bits."""
    moved = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, trained_part(average, frozen), trained)
    return with_part(average, moved)


def _with_trained(variables: dict[str, Any], trained: Any) -> dict[str, Any]:
    """A state's variables with other values for those that are trained."""
    name = trained_collection(variables)
    return {**variables, name: with_part(variables[name], trained)}


def _balanced(
    variables: dict[str, Any], expert_load: jax.Array | None, rate: float, frozen: frozenset[str]
) -> dict[str, Any]:
    """Moves the bias of every router that trains towards equal load; row i of `expert_load` is layer i of the loop."""
    if expert_load is None or "balance" not in variables:
        return variables
    cell = {}
    for i, load_E in enumerate(expert_load):
        bias_E = variables["balance"]["recurrence"]["cell"][f"layer_{i}"]["moe"]["router"]["bias"]
        is_frozen = f"recurrence.cell.layer_{i}.moe.router.kernel" in frozen
        cell[f"layer_{i}"] = {"moe": {"router": {"bias": bias_E if is_frozen else balanced(bias_E, load_E, rate)}}}
    return {**variables, "balance": {"recurrence": {"cell": cell}}}
