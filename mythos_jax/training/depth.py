"""Training at random depth: how many loops each row runs, and backpropagation through the last of them."""

import jax
import jax.numpy as jnp

from mythos_jax.config import Config, backprop_loops, max_loops, mean_loops
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import Output
from mythos_jax.sharding import constrain


def draw_depths(config: Config, step: jax.Array, rows: int) -> jax.Array:
    """Total loops of each row, int32 [rows], between 1 and `max_loops`. step: int32 [], may be traced.

    The random bits depend on (seed, step) only, so every host, mesh and accumulation sees the same depths.
    """
    depth = config.training.depth
    mean = curriculum_mean(config, step)
    # A stream of its own, apart from the keys that initialise the weights.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.training.seed), 0x6465), step)
    drawn = _DRAWS[depth.distribution](key, mean, (rows if depth.sample_per == "sequence" else 1,))
    # Every device draws for itself; otherwise all would wait for each other in each round of the sampler.
    drawn = constrain(drawn, None)
    return jnp.broadcast_to(jnp.clip(drawn, 1, max_loops(config)).astype(jnp.int32), (rows,))


def order_by_depth(loops_B: jax.Array, parts: int) -> jax.Array:
    """An order of the batch's rows in which part i of accumulation, rows i, i + parts, i + 2 parts, …, gets rows of
    similar depth: a part runs as many loops as its deepest row. Int32 [B]."""
    return jnp.argsort(loops_B).reshape(parts, -1).T.reshape(-1)


def truncated_forward(
    model: Mythos,
    tokens_BT: jax.Array,
    segment_ids: jax.Array | None,
    loops: jax.Array,
    halting: Halting | None,
    *,
    backprop_loops: int,
    limit: int | jax.Array | None = None,
    skip_idle: bool = False,
    trace_states: bool = False,
) -> Output:
    """The forward pass with gradients through each row's last `backprop_loops` loops only (truncated backpropagation
    through depth: Huginn, arXiv 2502.05171, section 3.3). loops: int32 [B], traced: any depth is the same program.

    First the loops without gradient, under a while loop, then the others, under a scan; rows that are done are carried
    unchanged. limit: a smaller number of loops with gradients, which may be traced. skip_idle: the scan leaves out the
    loops that no row runs. With ACT the output of every loop counts, so all have gradients and `backprop_loops` must
    bound them.
    trace_states: the trace has the states after the loops with gradients.
    """
    tokens, _ = model.begin(tokens_BT, segment_ids=segment_ids)
    start_B = jnp.maximum(loops - (backprop_loops if limit is None else limit), 0)
    router = None
    if tokens.act is None:
        before, _, trace = model.loop(tokens, loops=loops, halting=halting, count=start_B)
        before, router = jax.lax.stop_gradient((before, trace.router))
        # Rows whose loops all have gradients keep the gradient of their initial state.
        state_BTD = jnp.where((start_B > 0)[:, None, None], before.state_BTD, tokens.state_BTD)
        tokens = before.replace(inputs=tokens.inputs, state_BTD=state_BTD)
    tokens, _, trace = model.loop(
        tokens,
        loops=loops,
        halting=halting,
        start=start_B,
        count=backprop_loops,
        trace_states=trace_states,
        skip_idle=skip_idle,
    )
    if router is not None:
        trace = trace.replace(router=jax.tree.map(jnp.add, router, trace.router))
    return model.finish(tokens, trace=trace, logits=False)


def loops_without_gradient(config: Config, steps: int = 32) -> float:
    """How many loops a training step runs without gradient, for estimates: the mean over some steps at full depth.

    Each part of accumulation runs as many as its deepest row, and rows are ordered by depth.
    """
    rows, parts = config.training.batch_size, config.training.grad_accumulation_steps
    late = config.training.curriculum_length + jnp.arange(steps)

    def without(step: jax.Array) -> jax.Array:
        deepest = jnp.sort(draw_depths(config, step, rows)).reshape(parts, -1)[:, -1]
        return jnp.maximum(deepest - loops_with_gradient(config, step), 0)

    return float(jax.vmap(without)(late).mean())


def loops_with_gradient(config: Config, step: jax.Array) -> int | jax.Array:
    """Through how many last loops of a row gradients flow at most: `backprop_loops`, and where the config says so no
    more than the mean of the step, rounded up. Then it is traced, int32 []."""
    most = backprop_loops(config)
    if not (config.training.depth.backprop_up_to_mean and config.training.curriculum_length):
        return most
    # The mean is rounded in float32: 4 that came out as 4.0000005 is 4.
    return jnp.minimum(jnp.ceil(curriculum_mean(config, step) - 1e-5).astype(jnp.int32), most)


def curriculum_mean(config: Config, step: jax.Array) -> jax.Array:
    """The mean depth at a step, float32: 1 at first, the full mean after the curriculum, and a constant without one.

    1 + (mean - 1) f(p) with p the share of the curriculum's steps that are done, and f(p) = p or 1 - sqrt(1 - p), which
    rises late (arXiv 2511.07384, whose code rounds mean f(p) up to a whole number).
    """
    mean, length = mean_loops(config), config.training.curriculum_length
    if not length:
        return jnp.float32(mean)
    done = jnp.minimum(step / length, 1)
    risen = done if config.training.depth.curriculum == "linear" else 1 - jnp.sqrt(1 - done)
    return 1 + (mean - 1) * risen


def _fixed(key: jax.Array, mean: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.round(mean), shape)


def _uniform(key: jax.Array, mean: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """1 … 2 mean - 1 with equal probability."""
    return jnp.floor(1 + jax.random.uniform(key, shape) * (2 * jnp.round(mean) - 1))


def _poisson(key: jax.Array, mean: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Poisson(mean) (Parcae, arXiv 2604.12946); `draw_depths` raises 0 to 1."""
    return jax.random.poisson(key, mean, shape)


def _lognormal_poisson(key: jax.Array, mean: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Poisson(rate) + 1 with rate ~ LogNormal(ln mean - sigma^2 / 2, sigma), sigma = 1/2 (Huginn, arXiv 2502.05171).

    With mean 32: mean 33, median 29.
    """
    sigma = 0.5
    normal_key, poisson_key = jax.random.split(key)
    rate = jnp.exp(jnp.log(mean) - sigma**2 / 2 + sigma * jax.random.normal(normal_key, shape))
    return jax.random.poisson(poisson_key, rate, shape) + 1


_DRAWS = {"fixed": _fixed, "uniform": _uniform, "poisson": _poisson, "lognormal_poisson": _lognormal_poisson}
