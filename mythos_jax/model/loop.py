"""Running one loop many times: what is carried from loop to loop, what all loops share, and the two drivers.

Both drivers run the same cell and broadcast the same weights: `nn.scan` for a fixed number of loops, with reverse mode
and a trace of every loop; `nn.while_loop` for a number that is traced or depends on the tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.config.model import Remat
from mythos_jax.model.attention import AttentionContext, make_attention_context
from mythos_jax.model.cache import Cache, LayerCache, broadcast_mask, empty_kv
from mythos_jax.model.exit_probe import LogitProbe
from mythos_jax.model.gather import GATHERED, LOW_RANK, SCALES, prevent_hoisting
from mythos_jax.model.halting import Halting, check_halting
from mythos_jax.model.moe import RouterStats
from mythos_jax.model.predictor import predicted_loops
from mythos_jax.model.remat import remat_loop
from mythos_jax.model.state import TokenInputs, TokenState, Trace

# The collections that all loops read: parameters, router biases, gathered copies of parameters, scales of parameters
# that are stored as int8, low-rank weights beside parameters (model/gather.py).
SHARED = ("params", "balance", GATHERED, SCALES, LOW_RANK)

# Which tokens a loop carries unchanged: none; those that have halted; or those in rows that have run all their loops.
Freeze = Literal["none", "halted", "finished"]


class LoopContext(struct.PyTreeNode):
    """What all loops of a call share.

    values: for each layer of the loop, value embeddings [B, T, G, K] or None. predicted_BT: int32, the loops that each
    token is to run, where the halting policy predicts them.
    limit, stop: int32 [] or [B, 1]. `limit` is the depth that a row is on its way to; this call ends before loop
    `stop`. start: int32 [] or [B], the first loop of this call. count: how many loops it runs, where that is fixed and
    no token can halt, else None. same_loop: all rows are at the same loop. trace_states: the trace keeps each state.
    skip_idle: a scan leaves out the loops that no row runs.
    """

    inputs: TokenInputs
    attention: AttentionContext
    values: tuple[jax.Array | None, ...]
    predicted_BT: jax.Array | None
    halting: Halting | None
    limit: jax.Array
    start: jax.Array
    stop: jax.Array
    count: int | None = struct.field(pytree_node=False)
    freeze: Freeze = struct.field(pytree_node=False)
    same_loop: bool = struct.field(pytree_node=False)
    trace_states: bool = struct.field(pytree_node=False, default=False)
    skip_idle: bool = struct.field(pytree_node=False, default=False)


def make_context(
    config: ModelConfig,
    inputs: TokenInputs,
    values: tuple[jax.Array | None, ...],
    predictor: Mapping[str, jax.Array] | None,
    cache: Cache | None,
    loops: int | jax.Array,
    halting: Halting | None,
    start: int | jax.Array,
    count: int | jax.Array | None,
) -> LoopContext:
    """Checks the loops that `Mythos.loop` was asked for, and decides who is frozen."""
    check_halting(config, halting, cached=cache is not None)
    if halting is not None and cache is not None and inputs.tokens_BT.shape[1] > 1:
        loops, halting = halting.for_prompt(loops)
    _check_loops(loops, start, count, cache)
    # Without halting and with Python numbers the count is known when the program is traced: a scan can run it.
    fixed = None
    if halting is None:
        fixed = count if isinstance(count, int) else None
        if count is None and isinstance(loops, int) and isinstance(start, int):
            fixed = loops - start
    predicted_BT = None
    if halting is not None and halting.criterion == "predicted":
        predicted_BT = predicted_loops(predictor, inputs.injected_BTD, halting.threshold)
    limit = jnp.asarray(loops if halting is None else halting.limit(loops), jnp.int32)
    if cache is not None and cache.max_loops is not None:
        limit = jnp.minimum(limit, cache.max_loops)  # a deeper loop would overwrite the first ones
    given_start, start = start, jnp.asarray(start, jnp.int32)
    stop = limit if count is None else jnp.minimum(limit, start + count)
    # A scan of a fixed number of loops may go on after a depth that only the running program knows.
    passes = fixed is not None and not (isinstance(loops, int) and isinstance(given_start, int))
    if stop.ndim == 0 and (start.ndim == 1 or passes):  # rows that start at different loops also end in different ones
        stop = jnp.broadcast_to(stop, inputs.tokens_BT.shape[:1])
    # Rows of different depths freeze those that are done; a policy freezes tokens, if the model wants it.
    freeze: Freeze = "none"
    if halting is not None and config.freeze_halted:
        freeze = "halted"
    elif stop.ndim == 1:
        freeze = "finished"
    return LoopContext(
        inputs=inputs,
        attention=make_attention_context(config, inputs),
        values=values,
        predicted_BT=predicted_BT,
        halting=halting,
        limit=limit[:, None] if limit.ndim == 1 else limit,
        start=start,
        stop=stop[:, None] if stop.ndim == 1 else stop,
        count=fixed,
        freeze=freeze,
        same_loop=start.ndim == 0,
    )


def prepare_tokens(
    config: ModelConfig, tokens: TokenState, context: LoopContext, probe: LogitProbe | None
) -> TokenState:
    """The tokens with all fields that this call's loops need: those who freeze tokens remember keys and values of the
    last loop, a probe what it measured. Padding starts out halted where halted tokens are frozen."""
    # Others see a frozen token through its keys and values: in a cache, or in this call under a policy. Where all loops
    # attend to those of the first, a cache has them.
    exit_kv, cached = tokens.exit_kv, context.inputs.index_BT is not None
    frozen = context.freeze == "halted" or (context.freeze != "none" and cached)
    if exit_kv is None and (frozen or (config.loop_kv == "first" and not cached)):
        exit_kv = (empty_kv(config, *tokens.halted_BT.shape),) * config.loop_layers
    return tokens.replace(
        halted_BT=tokens.halted_BT | ~context.inputs.active_BT if context.freeze == "halted" else tokens.halted_BT,
        exit_kv=exit_kv,
        # Without a probe, what an earlier one saw is out of date after the next loop.
        probe=probe and (tokens.probe or probe.start(tokens.state_BTD)),
    )


def _check_loops(
    loops: int | jax.Array, start: int | jax.Array, count: int | jax.Array | None, cache: Cache | None
) -> None:
    """Raises ValueError for numbers of loops that cannot be run; traced numbers are not looked at."""
    if isinstance(loops, int):
        if loops < 1:
            raise ValueError(f"loops: got {loops}, allowed: an integer >= 1")
        if cache is not None and cache.max_loops is not None and loops > cache.max_loops:
            raise ValueError(f"loops: got {loops}, allowed: at most the {cache.max_loops} the cache was made for")
        if isinstance(start, int) and not 0 <= start <= loops:
            raise ValueError(f"start: got {start}, allowed: 0 to loops, {loops}")
    left = loops - start if isinstance(loops, int) and isinstance(start, int) else None
    if isinstance(count, int) and not 0 <= count <= (count if left is None else left):
        allowed = "an integer >= 0" if left is None else f"0 to {left}, the loops that are left"
        raise ValueError(f"count: got {count}, allowed: {allowed}")


class Carry(struct.PyTreeNode):
    """What goes from loop to loop.

    tokens: without their inputs, which no loop changes (in a scan they would be saved once per loop), and without
    exit_kv, which are in the caches. caches: of the loop's layers. coda: the coda's caches, written by a halting
    criterion that looks at logits. router: sums so far.
    """

    tokens: TokenState
    caches: tuple[LayerCache, ...]
    coda: tuple[LayerCache, ...]
    router: RouterStats | None


Cell = Any  # RecurrentCell, which is above this file
# The third argument is what a scan has for each loop: the loop of each row, int32 [B], and with `skip_idle` also
# whether any row runs it, bool [].
RunLoop = Callable[[Cell, Carry, Any, LoopContext], tuple[Carry, Trace]]


def loop_function(
    call: RunLoop, remat: Remat, gather_per_loop: bool, idle: Callable[[Carry, LoopContext], Trace] | None = None
) -> RunLoop:
    """The cell's call as the drivers run it: with rematerialisation, and with weights gathered in every loop.

    idle: the trace of a loop that no row runs; if it is given, such loops are left out.
    """
    # Inside the remat, which keeps only what a loop starts from; outside it, the weights would be kept once per loop.
    if idle is not None:
        call = _skip_idle(call, idle)
    # Tied inside the remat, so that the backward pass gathers the weights again instead of keeping them.
    if gather_per_loop:
        call = prevent_hoisting(call)
    return remat_loop(call, remat)


def _skip_idle(call: RunLoop, idle: Callable[[Carry, LoopContext], Trace]) -> RunLoop:
    """The cell's call, or where no row runs the loop the carry as it is: all tokens are frozen then."""

    def run(cell: Cell, carry: Carry, loop: tuple[jax.Array, jax.Array], context: LoopContext) -> tuple[Carry, Trace]:
        loop_B, is_run = loop
        branches = (
            lambda cell, carry: call(cell, carry, loop_B, context),
            lambda cell, carry: (carry, idle(carry, context)),
        )
        carry, trace = nn.cond(is_run, *branches, cell, carry)
        return carry, trace

    return run


def scan_loops(run: RunLoop, cell: Cell, carry: Carry, context: LoopContext) -> tuple[Carry, Trace]:
    """`context.count` loops of every row, from `context.start` on; returns the trace stacked over loops."""
    start_B = jnp.broadcast_to(context.start, carry.tokens.halted_BT.shape[:1])
    loops: Any = start_B + jnp.arange(context.count, dtype=jnp.int32)[:, None]
    if context.skip_idle:  # before the scan, so that devices agree once and not in every loop
        loops = loops, (loops < context.stop[:, 0]).any(-1)
    # Broadcasting the variables makes every loop use the same weights, and their gradients add up.
    scan = nn.scan(
        run,
        variable_broadcast=SHARED,
        split_rngs={"params": False},
        in_axes=(0, nn.broadcast),
        length=context.count,
    )
    return scan(cell, carry, loops, context)


def while_loops(
    run: RunLoop, cell: Cell, carry: Carry, context: LoopContext, probe: LogitProbe | None
) -> tuple[Carry, jax.Array]:
    """Loops from `context.start` to `context.stop`, ending early when every token has halted.

    Returns the carry and, shaped like `start`, the loop that each row ended before. No reverse mode.
    """
    # A counter and a carry; the trace of a loop is dropped, since the number of loops is not known.
    rows, start, halting = carry.tokens.halted_BT.shape[0], context.start, context.halting
    if context.same_loop:  # count with t itself
        first, end = start, context.stop.max()
    else:  # count the loops of this call
        first, end = jnp.int32(0), (context.stop.reshape(-1) - start).max()

    def loop_of(t: jax.Array) -> jax.Array:
        return jnp.full(rows, t, jnp.int32) if context.same_loop else start + t

    def more(_, state):
        t, carry = state
        # Without a policy all loops run: tokens whose ACT has halted still have keys and values to remember.
        return t < end if halting is None else (t < end) & ~carry.tokens.halted_BT.all()

    def body(cell, state):
        t, carry = state
        carry, _ = run(cell, carry, loop_of(t), context)
        if probe is not None:
            carry = _halt_by_logits(probe, carry, t if context.same_loop else loop_of(t)[:, None], context, halting)
        return t + 1, carry

    t, carry = nn.while_loop(more, body, cell, (first, carry), broadcast_variables=SHARED, split_rngs={"params": False})
    return carry, t if context.same_loop else start + t


def _halt_by_logits(
    probe: LogitProbe, carry: Carry, loop_B1: jax.Array, context: LoopContext, halting: Halting
) -> Carry:
    """Who halts after loop t = `loop_B1`, which the cell has just run."""
    tokens, before = carry.tokens, carry.tokens.probe
    assert before is not None, "prepare_tokens starts a probe"
    seen, coda, met_BT = probe.look(halting, before, carry.coda, tokens.state_BTD, loop_B1)
    if context.stop.ndim > 0:
        # Rows that have run all their loops have not moved: comparing them again would say that they have converged.
        moved_B1 = loop_B1 < context.stop
        met_BT &= moved_B1
        seen = jax.tree.map(lambda new, old: jnp.where(broadcast_mask(moved_B1, new), new, old), seen, before)
    halted_BT = tokens.halted_BT | (met_BT & (loop_B1 + 1 >= halting.min_loops))
    return carry.replace(tokens=tokens.replace(halted_BT=halted_BT, probe=seen), coda=coda)
