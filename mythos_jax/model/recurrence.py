"""The recurrent block: the mathematics of one loop, and the bookkeeping that decides which tokens it applies to.

`RecurrentCell` runs one loop: `next_state` is the equation, `__call__` the bookkeeping around it. `RecurrentBlock` runs
the cell over a range of loops with one of the drivers in model/loop.py: `nn.scan`, which can be differentiated, if the
number of loops is known when the program is traced and no policy can halt tokens; else `nn.while_loop`.
Shape letters as in model/mythos.py; B1 is [B, 1] (or a scalar), to broadcast over the tokens of a row.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.config import ModelConfig
from mythos_jax.model.attention import AttentionContext
from mythos_jax.model.block import TransformerBlock, apply_layers
from mythos_jax.model.cache import LayerCache, fill_skipped_loops
from mythos_jax.model.exit_probe import LogitProbe
from mythos_jax.model.halting import act_weight, relative_change, state_criterion_met
from mythos_jax.model.injection import INJECTIONS, LoopLoRA, loop_embedding
from mythos_jax.model.layers import RMSNorm, matrix_init
from mythos_jax.model.loop import Carry, LoopContext, loop_function, scan_loops, while_loops
from mythos_jax.model.moe import RouterStats, add_stats, no_stats, start_gradient_sums
from mythos_jax.model.state import ActState, TokenState, Trace
from mythos_jax.sharding import constrain


class Masks(NamedTuple):
    """Which tokens and rows loop t applies to; bool.

    frozen_BT: the token is carried unchanged. Its state stays that of the last loop that it ran, and so do the keys and
    values through which other tokens see it (None: no token can be frozen). running_BT: the loop counts for the token,
    in `loops` and in the ACT sum. counted_BT: the token counts in the router's statistics.
    may_halt_B1: at least `min_loops` loops will have run. last_B1: the row reaches its target depth with this loop.
    """

    frozen_BT: jax.Array | None
    running_BT: jax.Array
    counted_BT: jax.Array
    may_halt_B1: jax.Array
    last_B1: jax.Array


def make_masks(halted_BT: jax.Array, loop_B1: jax.Array, context: LoopContext) -> Masks:
    """The masks of loop t = `loop_B1`, given which tokens halted before it. `context.limit` is the target depth of a
    row, `context.stop` the loop before which this call ends; `context.freeze` follows from policy and config."""
    active_BT = context.inputs.active_BT  # not padding
    min_loops = 1 if context.halting is None else context.halting.min_loops
    may_halt_B1, last_B1 = loop_B1 + 1 >= min_loops, loop_B1 + 1 >= context.limit
    if context.freeze == "none":  # no policy, or a model with freeze_halted false
        # Tokens whose ACT has halted keep evolving, as in the original OpenMythos; they only stop adding to its sum.
        return Masks(None, ~halted_BT, active_BT, may_halt_B1, last_B1)
    finished_BT = jnp.broadcast_to(loop_B1 >= context.stop, halted_BT.shape)
    if context.freeze == "finished":  # no policy, but rows run different numbers of loops
        frozen_BT = finished_BT
    else:  # "halted": a policy; if all rows stop at the same loop, the driver ends there and none has to be frozen
        frozen_BT = halted_BT if context.stop.ndim == 0 else halted_BT | finished_BT
    return Masks(frozen_BT, ~halted_BT & ~frozen_BT, active_BT & ~frozen_BT, may_halt_B1, last_B1)


class RecurrentCell(nn.Module):
    """One loop of the recurrent block."""

    config: ModelConfig

    def next_state(
        self, carry: Carry, loop_B: jax.Array, attention: AttentionContext, context: LoopContext, counted_BT: jax.Array
    ) -> tuple[jax.Array, tuple[LayerCache, ...], list[RouterStats | None]]:
        """h_(t+1) = norm(leave(h_t, e, y + LoRA_t(y))), where y = layers_t(enter(h_t, e + wave_t)).

        The injection is the pair `enter` and `leave` (model/injection.py). The layers depend on t only through the keys
        and values that they attend to. norm, LoRA_t and the scaled loop embedding wave_t are there if configured.
        """
        c, h_BTD, e_BTD = self.config, carry.tokens.state_BTD, context.inputs.injected_BTD
        injection = INJECTIONS[c.injection](c, name="injection")
        entering_BTD = e_BTD
        if c.loop_embedding:
            wave_B1D = c.loop_embedding_scale * loop_embedding(loop_B, c.dim)
            entering_BTD = e_BTD + wave_B1D.astype(e_BTD.dtype)
        y_BTD = constrain(injection.enter(h_BTD, entering_BTD), "batch", "length", "act_embed")
        first = c.prelude_layers
        layers = [TransformerBlock(c, first + i, in_loop=True, name=f"layer_{i}") for i in range(c.loop_layers)]
        y_BTD, caches, stats = apply_layers(layers, y_BTD, attention, carry.caches, counted_BT, context.values)
        if c.lora_rank:
            y_BTD += LoopLoRA(c, name="lora")(y_BTD, loop_B)
        h_BTD = injection.leave(h_BTD, e_BTD, y_BTD)
        return RMSNorm(c.norm_eps, name="state_norm")(h_BTD) if c.state_norm else h_BTD, caches, stats

    @nn.compact
    def __call__(self, carry: Carry, loop_B: jax.Array, context: LoopContext) -> tuple[Carry, Trace]:
        """Runs loop t = `loop_B` (int32 [B], each row at its own), and decides who halts after it."""
        old, halting = carry.tokens, context.halting
        masks = make_masks(old.halted_BT, loop_B[:, None], context)
        t = loop_B[0] if context.same_loop else loop_B  # one number keeps the cache's slot a slice
        attention = context.attention.replace(loop=t, frozen_BT=masks.frozen_BT)
        state_BTD, caches, stats = self.next_state(carry, loop_B, attention, context, masks.counted_BT)
        trace = Trace(change_LBT=relative_change(state_BTD, old.state_BTD))
        if masks.frozen_BT is not None:
            state_BTD = jnp.where(masks.frozen_BT[..., None], old.state_BTD, state_BTD)
        state_BTD = constrain(state_BTD, "batch", "length", "act_embed")

        act, survival_BT, halts_BT = old.act, old.survival_BT, jnp.zeros_like(old.halted_BT)
        if act is not None:  # the only criterion for a model with ACT read-out
            act, halts_BT, trace = self.act_step(act, state_BTD, masks, context, trace)
        elif survival_BT is not None:
            logit_BT = self.halt_logit(state_BTD)
            p_BT = nn.sigmoid(logit_BT)
            survival_BT = jnp.where(masks.running_BT, survival_BT * (1 - p_BT), survival_BT)
            trace = trace.replace(halt_probability_LBT=p_BT, halt_logit_LBT=logit_BT)
        if (frozen_BT := masks.frozen_BT) is not None:  # nothing of the loop counts
            trace = jax.tree.map(lambda x_BT: jnp.where(frozen_BT, 0, x_BT), trace)
        if context.trace_states:
            trace = trace.replace(state_LBTD=state_BTD)
        if halting is not None and act is None:
            change = state_BTD, old.state_BTD
            halts_BT = state_criterion_met(halting, loop_B[:, None], *change, survival_BT, context.predicted_BT)
        if masks.frozen_BT is not None:
            # A row at its target depth has halted. A frozen state does not move, which is not convergence.
            halts_BT = (halts_BT | masks.last_B1) & ~masks.frozen_BT

        tokens = old.replace(
            state_BTD=state_BTD,
            halted_BT=old.halted_BT | halts_BT,
            loops_BT=old.loops_BT + masks.running_BT,
            act=act,
            survival_BT=survival_BT,
        )
        return carry.replace(tokens=tokens, caches=caches, router=add_stats(carry.router, stats)), trace

    def halt_logit(self, state_BTD: jax.Array) -> jax.Array:
        """w h + b, whose sigmoid is the halting probability; float32 [B, T]."""
        kernel = self.param(
            "halt_kernel", matrix_init(self.config.std, "embed", None), (self.config.dim, 1), jnp.float32
        )
        bias = self.param("halt_bias", nn.initializers.zeros, (1,), jnp.float32)
        return (state_BTD.astype(jnp.float32) @ kernel + bias)[..., 0]

    def act_step(
        self, act: ActState, state_BTD: jax.Array, masks: Masks, context: LoopContext, trace: Trace
    ) -> tuple[ActState, jax.Array, Trace]:
        """Adaptive computation time: p = sigmoid(w h_(t+1) + b) is the weight of h_(t+1) in the read-out, until the sum
        of p reaches the threshold: then the token halts, and h_(t+1) gets what is missing to 1 (model/halting.py)."""
        c, halting = self.config, context.halting
        p_BT = nn.sigmoid(self.halt_logit(state_BTD))
        override = None if halting is None else halting.threshold
        threshold = c.act_threshold if override is None else override
        last_B1 = masks.last_B1 if c.act_remainder else None  # OpenMythos loses the remaining weight
        weight_BT, sum_BT, halts_BT = act_weight(p_BT, act.probability_BT, threshold, masks.may_halt_B1, last_B1)
        weight_BT *= masks.running_BT  # halted tokens have spent all of theirs
        act = ActState(
            readout_BTD=act.readout_BTD + weight_BT[..., None] * state_BTD.astype(jnp.float32),
            probability_BT=jnp.where(masks.running_BT, sum_BT, act.probability_BT),
        )
        return act, halts_BT, trace.replace(halt_probability_LBT=p_BT, act_weight_LBT=weight_BT)


def idle_trace(carry: Carry, context: LoopContext) -> Trace:
    """The trace of a loop that no row runs: `RecurrentCell` with all tokens frozen."""
    tokens, zeros_BT = carry.tokens, jnp.zeros(carry.tokens.halted_BT.shape)
    trace = Trace(change_LBT=zeros_BT, state_LBTD=tokens.state_BTD if context.trace_states else None)
    if tokens.act is not None:
        return trace.replace(halt_probability_LBT=zeros_BT, act_weight_LBT=zeros_BT)
    if tokens.survival_BT is not None:
        return trace.replace(halt_probability_LBT=zeros_BT, halt_logit_LBT=zeros_BT)
    return trace


class RecurrentBlock(nn.Module):
    """The cell, run any number of times."""

    config: ModelConfig
    gather_per_loop: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: TokenState,
        caches: tuple[LayerCache, ...],
        coda_caches: tuple[LayerCache, ...],
        context: LoopContext,
        probe: LogitProbe | None,
    ) -> tuple[TokenState, tuple[LayerCache, ...], tuple[LayerCache, ...], Trace]:
        """Runs the loops from `context.start` to `context.stop`, or until every token has halted. caches: of the
        loop's layers; coda_caches: for `probe`, which looks at the logits after each loop.

        Returns the tokens, both kinds of caches, and the trace of the loops.
        """
        c, before = self.config, tokens
        if tokens.exit_kv is not None:  # keys and values of the last loop that each token ran, for each layer
            caches = tuple(cache.replace(exit_kv=kv) for cache, kv in zip(caches, tokens.exit_kv, strict=True))
        # In a scan the carry is saved once per loop, so the inputs, which no loop changes, stay out of it.
        carry = Carry(tokens.replace(inputs=None, exit_kv=None), caches, coda_caches, no_stats(c))
        cell = RecurrentCell(c, name="cell")  # one cell: all loops share its weights
        idle = idle_trace if context.skip_idle else None
        run = loop_function(RecurrentCell.__call__, c.remat, self.gather_per_loop, idle)

        trace, end = Trace(), context.start
        if self.is_initializing():
            # Parameters cannot be made inside a while loop; one call makes all of them.
            carry, _ = cell(carry, jnp.zeros(tokens.halted_BT.shape[0], jnp.int32), context)
        elif context.count is not None:
            carry = carry.replace(caches=start_gradient_sums(c, caches, self.variables))
            carry, trace = scan_loops(run, cell, carry, context)
            carry = carry.replace(caches=tuple(cache.replace(expert_sums=None) for cache in carry.caches))
            end += context.count
        else:
            carry, end = while_loops(run, cell, carry, context, probe)

        tokens, caches = carry.tokens.replace(inputs=before.inputs), carry.caches
        if before.exit_kv is not None:
            exit_kv: Any = tuple(cache.exit_kv for cache in caches)
            tokens = tokens.replace(exit_kv=exit_kv)
            caches = tuple(cache.replace(exit_kv=None) for cache in caches)
            if (index_BT := context.inputs.index_BT) is not None:  # there is a decode cache
                # Later tokens may run deeper than those that halted here, and look for them in loops >= `end`.
                new_BT = tokens.halted_BT & ~before.halted_BT
                caches = fill_skipped_loops(caches, exit_kv, end, index_BT, new_BT)
        return tokens, caches, carry.coda, trace.replace(router=carry.router)
