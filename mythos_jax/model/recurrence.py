"""The recurrent block: the mathematics of one loop, and the bookkeeping that decides which tokens it applies to.

`RecurrentCell` holds the loop's weights and runs one loop: `next_state` is the equation, `__call__` the bookkeeping
around it. `RecurrentBlock` runs the cell from any loop to any loop (model/loop.py): under `nn.scan` for a fixed number
of loops, which can be differentiated, or `nn.while_loop` where the number is traced or tokens may halt.
Shape letters as in model/mythos.py; B1 is one value per row, to broadcast over its tokens.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.config import ModelConfig
from mythos_jax.model.attention import AttentionContext
from mythos_jax.model.block import TransformerBlock, apply_layers
from mythos_jax.model.cache import LayerCache, fill_skipped_loops
from mythos_jax.model.exit_probe import LogitProbe
from mythos_jax.model.halting import act_weight, relative_change, state_converged
from mythos_jax.model.injection import INJECTIONS, LoopLoRA, loop_embedding
from mythos_jax.model.layers import RMSNorm, matrix_init
from mythos_jax.model.loop import Carry, LoopContext, loop_function, scan_loops, while_loops
from mythos_jax.model.moe import RouterStats, no_stats
from mythos_jax.model.state import ActState, TokenState, Trace
from mythos_jax.sharding import constrain


class Masks(NamedTuple):
    """Which tokens and rows loop t concerns; bool.

    frozen_BT: the token is carried unchanged: its state, and the keys and values that others see, stay those of the
    last loop that it ran (None: no token is ever frozen). running_BT: the loop counts for the token, in `loops` and in
    the ACT sum. counted_BT: the token counts in the router's statistics; padding and frozen tokens do not.
    may_halt_B1: `min_loops` will have run after this loop. last_B1: this is the last loop that the row is to run.
    """

    frozen_BT: jax.Array | None
    running_BT: jax.Array
    counted_BT: jax.Array
    may_halt_B1: jax.Array
    last_B1: jax.Array


def make_masks(halted_BT: jax.Array, loop_B1: jax.Array, context: LoopContext) -> Masks:
    """The masks of loop t = `loop_B1`, given which tokens halted before it."""
    active_BT = context.inputs.active_BT
    min_loops = 1 if context.halting is None else context.halting.min_loops
    may_halt_B1, last_B1 = loop_B1 + 1 >= min_loops, loop_B1 + 1 >= context.limit
    if context.freeze == "none":
        # Halted tokens keep evolving like all others, as in the original OpenMythos; only their ACT weights end.
        return Masks(None, ~halted_BT, active_BT, may_halt_B1, last_B1)
    finished_BT = jnp.broadcast_to(loop_B1 >= context.stop, halted_BT.shape)
    if context.freeze == "finished":
        frozen_BT = finished_BT
    else:  # rows that stop at the same loop do so when the driver ends
        frozen_BT = halted_BT if context.stop.ndim == 0 else halted_BT | finished_BT
    return Masks(frozen_BT, ~halted_BT & ~frozen_BT, active_BT & ~frozen_BT, may_halt_B1, last_B1)


class RecurrentCell(nn.Module):
    """One loop of the recurrent block."""

    config: ModelConfig

    def next_state(
        self,
        h_BTD: jax.Array,
        e_BTD: jax.Array,
        loop_B: jax.Array,
        attention: AttentionContext,
        caches: tuple[LayerCache, ...],
        values: tuple[jax.Array | None, ...],
        counted_BT: jax.Array,
    ) -> tuple[jax.Array, tuple[LayerCache, ...], list[RouterStats | None]]:
        """h_(t+1) = norm(leave(h_t, e, y + LoRA_t(y))), where y = layers(enter(h_t, e + wave_t)).

        The injection is the pair `enter` and `leave` (model/injection.py). norm, LoRA_t and the loop embedding wave_t
        are there if the config says so.
        """
        c = self.config
        injection = INJECTIONS[c.injection](c, name="injection")
        entering_BTD = e_BTD
        if c.loop_embedding:
            wave_B1D = c.loop_embedding_scale * loop_embedding(loop_B, c.dim)
            entering_BTD = e_BTD + wave_B1D.astype(e_BTD.dtype)
        y_BTD = constrain(injection.enter(h_BTD, entering_BTD), "batch", "length", "act_embed")
        first = c.prelude_layers
        layers = [TransformerBlock(c, first + i, in_loop=True, name=f"layer_{i}") for i in range(c.loop_layers)]
        y_BTD, caches, stats = apply_layers(layers, y_BTD, attention, caches, counted_BT, values)
        if c.lora_rank:
            y_BTD += LoopLoRA(c, name="lora")(y_BTD, loop_B)
        h_BTD = injection.leave(h_BTD, e_BTD, y_BTD)
        return RMSNorm(c.norm_eps, name="state_norm")(h_BTD) if c.state_norm else h_BTD, caches, stats

    @nn.compact
    def __call__(self, carry: Carry, loop_B: jax.Array, context: LoopContext) -> tuple[Carry, Trace]:
        """Runs loop t = `loop_B` (int32 [B], each row at its own), and decides who halts after it."""
        old, halting = carry.tokens, context.halting
        who = make_masks(old.halted_BT, loop_B[:, None], context)
        attention = context.attention.replace(loop=loop_B[0] if context.uniform else loop_B, frozen_BT=who.frozen_BT)

        e_BTD, values = context.inputs.injected_BTD, context.values
        state_BTD, caches, stats = self.next_state(
            old.state_BTD, e_BTD, loop_B, attention, carry.caches, values, who.counted_BT
        )
        trace = Trace(change_LBT=relative_change(state_BTD, old.state_BTD))  # of the step itself, frozen or not
        if who.frozen_BT is not None:
            state_BTD = jnp.where(who.frozen_BT[..., None], old.state_BTD, state_BTD)
        state_BTD = constrain(state_BTD, "batch", "length", "act_embed")

        act, halts_BT = old.act, jnp.zeros_like(old.halted_BT)
        if act is not None:
            act, halts_BT, trace = self.act_step(act, state_BTD, who, context, trace)
        elif halting is not None:
            if context.predicted_BT is None:
                halts_BT = state_converged(halting, state_BTD, old.state_BTD)
            else:
                halts_BT = loop_B[:, None] + 1 >= context.predicted_BT
            halts_BT &= who.may_halt_B1
        if who.frozen_BT is not None:
            halts_BT |= who.last_B1 & ~who.frozen_BT  # no loop is left to run

        tokens = old.replace(
            state_BTD=state_BTD,
            halted_BT=old.halted_BT | halts_BT,
            loops_BT=old.loops_BT + who.running_BT,
            act=act,
        )
        router = carry.router and jax.tree.map(lambda total, *new: total + jnp.stack(new), carry.router, *stats)
        return carry.replace(tokens=tokens, caches=caches, router=router), trace

    def act_step(
        self, act: ActState, state_BTD: jax.Array, who: Masks, context: LoopContext, trace: Trace
    ) -> tuple[ActState, jax.Array, Trace]:
        """Adaptive computation time: p = sigmoid(w h + b) gives this loop's state its weight in the read-out."""
        c, halting = self.config, context.halting
        kernel = self.param("halt_kernel", matrix_init(c.std, "embed", None), (c.dim, 1), jnp.float32)
        bias = self.param("halt_bias", nn.initializers.zeros, (1,), jnp.float32)
        p_BT = nn.sigmoid(state_BTD.astype(jnp.float32) @ kernel + bias)[..., 0]
        given = None if halting is None else halting.threshold
        threshold = c.act_threshold if given is None else given
        last_B1 = who.last_B1 if c.act_remainder else None  # the original loses the weight that is left
        weight_BT, probability_BT, halts_BT = act_weight(p_BT, act.probability_BT, threshold, who.may_halt_B1, last_B1)
        weight_BT *= who.running_BT  # halted tokens have spent all of theirs
        act = ActState(
            readout_BTD=act.readout_BTD + weight_BT[..., None] * state_BTD.astype(jnp.float32),
            probability_BT=jnp.where(who.running_BT, probability_BT, act.probability_BT),
        )
        return act, halts_BT, trace.replace(halt_probability_LBT=p_BT, act_weight_LBT=weight_BT)


class RecurrentBlock(nn.Module):
    """The cell, run any number of times."""

    config: ModelConfig
    gather_per_loop: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: TokenState,
        caches: tuple[LayerCache, ...],
        coda: tuple[LayerCache, ...],
        context: LoopContext,
        probe: LogitProbe | None,
    ) -> tuple[TokenState, tuple[LayerCache, ...], tuple[LayerCache, ...], Trace]:
        """Runs the loops that `context` says. caches, coda: of the layers of the loop and, for a `probe` that looks
        at the logits after each loop, of the coda.

        Returns the tokens, both caches, and the trace of the loops.
        """
        c, before = self.config, tokens
        if tokens.exit_kv is not None:
            caches = tuple(cache.replace(exit_kv=kv) for cache, kv in zip(caches, tokens.exit_kv, strict=True))
        # In a scan the carry is saved once per loop: what no loop changes stays out of it.
        carry = Carry(tokens.replace(inputs=None, exit_kv=None), caches, coda, no_stats(c))
        cell = RecurrentCell(c, name="cell")  # one cell: all loops share its weights
        run = loop_function(RecurrentCell.__call__, c.remat, self.gather_per_loop)

        trace, end = Trace(), context.start
        if self.is_initializing():
            # Parameters cannot be made inside a while loop; one call makes all of them.
            carry, _ = cell(carry, jnp.zeros(tokens.halted_BT.shape[0], jnp.int32), context)
        elif context.count is not None:
            carry, trace = scan_loops(run, cell, carry, context)
            end += context.count
        else:
            carry, end = while_loops(run, cell, carry, context, probe)

        tokens, caches = carry.tokens.replace(inputs=before.inputs), carry.caches
        if before.exit_kv is not None:
            tokens = tokens.replace(exit_kv=tuple(cache.exit_kv for cache in caches))
            if (index_BT := context.inputs.index_BT) is not None:
                # Tokens that run deeper than these did will look for them in the loops that they skipped.
                new_BT = tokens.halted_BT & ~before.halted_BT
                caches = tuple(fill_skipped_loops(cache, end, index_BT, new_BT) for cache in caches)
            caches = tuple(cache.replace(exit_kv=None) for cache in caches)
        return tokens, caches, carry.coda, trace.replace(router=carry.router)
