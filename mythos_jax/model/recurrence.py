"""The recurrent block: one cell, two drivers.

`RecurrentCell` holds the loop's weights and runs one loop on a `Carry`. `RecurrentBlock` drives it: with `nn.scan`
at a fixed depth (differentiable, gives a `Trace` of every loop), with `nn.while_loop` when the depth is traced,
differs by row, or tokens may halt. Both broadcast `params` and `balance`.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.attention import View
from mythos_jax.model.block import TransformerBlock
from mythos_jax.model.cache import KV, Memory, empty_kv, fill_deeper
from mythos_jax.model.halting import Halting, Reader, Reading, act_weight, check_halting, relative_change, state_rests
from mythos_jax.model.injection import INJECTIONS, LoopLoRA, loop_embedding
from mythos_jax.model.layers import RMSNorm
from mythos_jax.model.moe import RouterStats
from mythos_jax.ops.attention import SAVED
from mythos_jax.sharding import constrain

# What the forward pass keeps of each loop beside the state it starts from (`none`: all that the backward pass reads).
REMAT_POLICIES = {
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[SAVED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# What all loops share: parameters, router biases, and whole copies of parameters that the mesh cuts (`layers.weight`).
SHARED = ("params", "balance", "whole")


@struct.dataclass
class Carry:
    """What goes from loop to loop. Fields a configuration does not need are None."""

    state_BTD: jax.Array
    memory: tuple[Memory, ...]  # of each layer in the loop
    halted_BT: jax.Array  # bool: this token's loops have ended
    loops_BT: jax.Array  # int32: loops that contributed to the token
    router: RouterStats | None  # sums over loops so far, stacked over the layers of the loop
    readout_BTD: jax.Array | None  # ACT: weighted sum of states, float32
    probability_BT: jax.Array | None  # ACT: cumulative halting probability, float32
    reading: Reading | None = None  # what the coda made of the states, where the halting criterion looks at it


@struct.dataclass
class Paused:
    """Tokens in the middle of their loops, with all that a later call needs to go on where this one stopped.

    Every array is [B, T, ...], so that tokens of several calls can be put side by side. Their keys and values of the
    loops before `loop` stand in the cache. Fields as in `Carry`; last: of each layer, where halting needs it.
    """

    injected_BTD: jax.Array
    state_BTD: jax.Array
    halted_BT: jax.Array
    loops_BT: jax.Array
    readout_BTD: jax.Array | None
    probability_BT: jax.Array | None
    last: tuple[KV | None, ...]
    loop: int = struct.field(pytree_node=False)  # the next one to run


@struct.dataclass
class LoopInputs:
    """What every loop sees alike.

    injected_BTD: the prelude's output e. limit: int32 [] or [B, 1], loops a row may run. active_BT: false on padding.
    values: per layer, value embeddings or None. freeze: which tokens are carried unchanged, those that have `halted`,
    only those in rows that have run their `limit`, or none (None). predicted: loops foreseen for each token.
    """

    injected_BTD: jax.Array
    view: View
    limit: jax.Array
    active_BT: jax.Array
    values: tuple[jax.Array | None, ...]
    halting: Halting | None
    predicted_BT: jax.Array | None
    freeze: str | None = struct.field(pytree_node=False)


@struct.dataclass
class Trace:
    """What one loop tells about itself; the scan stacks it over loops. Float32 [B, T]."""

    change_BT: jax.Array  # |h_t - h_(t-1)| / |h_t|
    halt_probability_BT: jax.Array | None = None
    act_weight_BT: jax.Array | None = None


class RecurrentCell(nn.Module):
    """One loop: inject, run the layers, make the next state, decide who halts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry: Carry, loop_index_B: jax.Array, inputs: LoopInputs) -> tuple[Carry, Trace]:
        """loop_index_B: int32 t of each row. All rows of a cached call stand at the same loop."""
        c = self.config
        old_BTD, e_BTD = carry.state_BTD, inputs.injected_BTD
        running_BT = ~carry.halted_BT
        counted_BT, view, frozen_BT = inputs.active_BT, inputs.view, None
        if inputs.freeze:
            past_B1 = loop_index_B[:, None] >= inputs.limit
            frozen_BT = carry.halted_BT if inputs.freeze == "halted" else past_B1 & jnp.ones_like(running_BT)
            view = view.replace(frozen_BT=frozen_BT)
            counted_BT &= ~frozen_BT
            running_BT &= ~frozen_BT
        view = view.replace(loop=loop_index_B[0])

        injection = INJECTIONS[c.injection](c, name="injection")
        conditioned_BTD = e_BTD
        if c.loop_embedding:
            wave_B1D = c.loop_embedding_scale * loop_embedding(loop_index_B, c.dim)
            conditioned_BTD = e_BTD + wave_B1D.astype(e_BTD.dtype)
        x_BTD = constrain(injection.enter(old_BTD, conditioned_BTD), "batch", "length", "act_embed")
        memories, stats = [], []
        for i, memory in enumerate(carry.memory):
            block = TransformerBlock(c, c.prelude_layers + i, in_loop=True, name=f"layer_{i}")
            x_BTD, memory, layer_stats = block(x_BTD, view, memory, counted_BT, inputs.values[i])
            memories.append(memory)
            stats.append(layer_stats)
        if c.lora_rank:
            x_BTD += LoopLoRA(c, name="lora")(x_BTD, loop_index_B)
        new_BTD = injection.leave(old_BTD, e_BTD, x_BTD)
        if c.state_norm:
            new_BTD = RMSNorm(c.norm_eps, name="state_norm")(new_BTD)
        trace = Trace(relative_change(new_BTD, old_BTD))
        if inputs.freeze:
            new_BTD = jnp.where(frozen_BT[..., None], old_BTD, new_BTD)
        new_BTD = constrain(new_BTD, "batch", "length", "act_embed")

        done_B1 = loop_index_B[:, None] + 1 >= inputs.limit
        may_halt_B1 = loop_index_B[:, None] + 1 >= (1 if inputs.halting is None else inputs.halting.min_loops)
        if c.readout == "act":
            carry, halts_BT, trace = self._read_out(
                carry, new_BTD, running_BT, done_B1, may_halt_B1, inputs.halting, trace
            )
        elif inputs.halting is not None:
            if inputs.predicted_BT is None:
                met_BT = state_rests(inputs.halting, new_BTD, old_BTD)
            else:
                met_BT = loop_index_B[:, None] + 1 >= inputs.predicted_BT
            halts_BT = may_halt_B1 & met_BT
        else:
            halts_BT = jnp.zeros_like(carry.halted_BT)
        if inputs.freeze:
            halts_BT |= done_B1
        return carry.replace(
            state_BTD=new_BTD,
            memory=tuple(memories),
            halted_BT=carry.halted_BT | halts_BT,
            loops_BT=carry.loops_BT + running_BT,
            router=carry.router and jax.tree.map(lambda total, *new: total + jnp.stack(new), carry.router, *stats),
        ), trace

    def _read_out(
        self,
        carry: Carry,
        new_BTD: jax.Array,
        running_BT: jax.Array,
        done_B1: jax.Array,
        may_halt_B1: jax.Array,
        halting: Halting | None,
        trace: Trace,
    ) -> tuple[Carry, jax.Array, Trace]:
        """Adds this loop's state to the ACT-weighted sum."""
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(c.std), ("embed", None))
        kernel = self.param("halt_kernel", init, (c.dim, 1), jnp.float32)
        bias = self.param("halt_bias", nn.initializers.zeros, (1,), jnp.float32)
        p_BT = nn.sigmoid(new_BTD.astype(jnp.float32) @ kernel + bias)[..., 0]
        threshold = c.act_threshold
        if halting is not None and halting.threshold is not None:
            threshold = halting.threshold
        weight_BT, halts_BT = act_weight(
            p_BT, carry.probability_BT, threshold, may_halt_B1, done_B1 if c.act_remainder else None
        )
        weight_BT = weight_BT * running_BT
        carry = carry.replace(
            readout_BTD=carry.readout_BTD + weight_BT[..., None] * new_BTD.astype(jnp.float32),
            probability_BT=carry.probability_BT + p_BT * running_BT,
        )
        return carry, halts_BT, trace.replace(halt_probability_BT=p_BT, act_weight_BT=weight_BT)


class RecurrentBlock(nn.Module):
    """Runs the cell `loops` times from `state_BTD` and reads out what the coda receives."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        injected_BTD: jax.Array,
        state_BTD: jax.Array,
        *,
        loops: int | jax.Array,
        backprop_loops: int | None,
        gather_per_loop: bool,
        halting: Halting | None,
        view: View,
        memory: Sequence[Memory],
        slots: int | None,
        bounded: bool,
        active_BT: jax.Array,
        values: Sequence[jax.Array | None],
        reader: Reader | None = None,
        predicted_BT: jax.Array | None = None,
        pause: int | None = None,
        resume: Paused | None = None,
    ) -> tuple[jax.Array, Carry, Trace | None, Paused | None]:
        """loops: a Python int, a traced integer, or int32 [B] (each row its own depth).
        backprop_loops: for training without a cache or halting; a row's last so many loops have gradients.
        gather_per_loop: weights that the mesh cuts are made whole in every loop, never before (docs/sharding.md).
        reader: needed for halting by logits; the final carry then has what the coda made of the last states.
        predicted_BT: int32, needed for halting by prediction.
        pause: stop before this loop; `loops` stays the depth that the tokens are on their way to. resume: go on from
        there, `state_BTD` is then not looked at.

        Returns the read-out [B, T, D], the final carry, the trace [L, B, T] of the loops that have gradients, and,
        where the call was to pause, the tokens to resume from.
        """
        c = self.config
        check_halting(c, halting, cached=slots is not None)
        B, T, _ = injected_BTD.shape
        limit = jnp.asarray(loops if halting is None else halting.most(loops), jnp.int32)
        if slots is not None and not bounded:
            limit = jnp.minimum(limit, slots)
        by_row = limit.ndim == 1
        freeze = "halted" if halting is not None and c.freeze_halted else "limit" if by_row else None
        if backprop_loops is not None and (halting is not None or slots is not None or not by_row):
            raise ValueError("backprop_loops: allowed with loops [B] only, and without halting or a cache")
        if freeze == "halted" or (freeze and slots is not None):
            last = resume.last if resume else [empty_kv(c, B, T)] * c.loop_layers
            memory = [m.replace(last=kv) for m, kv in zip(memory, last, strict=True)]
        inputs = LoopInputs(
            injected_BTD=injected_BTD,
            view=view,
            limit=limit[:, None] if by_row else limit,
            active_BT=active_BT,
            values=tuple(values),
            halting=halting,
            predicted_BT=predicted_BT,
            freeze=freeze,
        )
        act = c.readout == "act"
        carry = Carry(
            state_BTD=state_BTD,
            memory=tuple(memory),
            halted_BT=~active_BT if freeze == "halted" else jnp.zeros_like(active_BT),
            loops_BT=jnp.zeros((B, T), jnp.int32),
            router=RouterStats(jnp.zeros((c.loop_layers, c.n_experts)), jnp.zeros(c.loop_layers))
            if c.feed_forward == "moe"
            else None,
            readout_BTD=jnp.zeros((B, T, c.dim)) if act else None,
            probability_BT=jnp.zeros((B, T)) if act else None,
            reading=reader and reader.start(state_BTD),
        )
        first = 0
        if resume is not None:
            first = resume.loop
            carry = carry.replace(
                state_BTD=resume.state_BTD,
                halted_BT=resume.halted_BT,
                loops_BT=resume.loops_BT,
                readout_BTD=resume.readout_BTD,
                probability_BT=resume.probability_BT,
            )
        cell = RecurrentCell(c, name="cell")
        one_loop = _tied if gather_per_loop else RecurrentCell.__call__
        if c.remat != "none":
            one_loop = nn.remat(one_loop, policy=REMAT_POLICIES[c.remat], prevent_cse=False)

        trace = None
        if self.is_initializing():
            # Parameters cannot be made inside a while loop; one call makes them all.
            carry, _ = cell(carry, jnp.zeros(B, jnp.int32), inputs)
        elif isinstance(loops, int) and halting is None:
            count = (loops if pause is None else pause) - first
            carry, trace = _scan(one_loop, cell, carry, jnp.full(B, first, jnp.int32), count, inputs)
        elif backprop_loops is not None:
            carry, trace = _truncated(one_loop, cell, carry, limit, backprop_loops, inputs)
        else:
            end = limit if pause is None else jnp.minimum(limit, pause)
            carry, ran = _while(one_loop, cell, carry, end, inputs, reader, first)
            if freeze and slots is not None:
                carry = carry.replace(memory=tuple(fill_deeper(m, ran, view.index_BT) for m in carry.memory))
        paused = None
        if pause is not None:
            paused = Paused(
                injected_BTD=injected_BTD,
                state_BTD=carry.state_BTD,
                halted_BT=carry.halted_BT,
                loops_BT=carry.loops_BT,
                readout_BTD=carry.readout_BTD,
                probability_BT=carry.probability_BT,
                last=tuple(m.last for m in carry.memory),
                loop=pause,
            )
            if act:  # the weight that is left goes to the state at hand, as if this were the last loop
                rest_BT = jnp.maximum(1 - carry.probability_BT, 0) * (~carry.halted_BT & (pause < inputs.limit))
                rest_BTD = rest_BT[..., None] * carry.state_BTD.astype(jnp.float32)
                carry = carry.replace(readout_BTD=carry.readout_BTD + rest_BTD)
        if freeze:
            carry = carry.replace(memory=tuple(m.replace(last=None) for m in carry.memory))
        readout_BTD = carry.readout_BTD.astype(state_BTD.dtype) if act else carry.state_BTD
        return readout_BTD, carry, trace, paused


OneLoop = Callable[[RecurrentCell, Carry, jax.Array, LoopInputs], tuple[Carry, Trace]]


def _tied(cell: RecurrentCell, carry: Carry, loop_index_B: jax.Array, inputs: LoopInputs) -> tuple[Carry, Trace]:
    """One loop with weights that seem to depend on it, so that no compiler gathers them before the first.

    XLA moves what is the same in every loop out of it, past an optimization barrier too (seen on CPU and TPU).
    """
    never = (carry.loops_BT < 0).any()

    def tie(variables):
        return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), variables)

    return nn.map_variables(RecurrentCell.__call__, "params", trans_in_fn=tie)(cell, carry, loop_index_B, inputs)


def _scan(
    one_loop: OneLoop, cell: RecurrentCell, carry: Carry, first_B: jax.Array, loops: int, inputs: LoopInputs
) -> tuple[Carry, Trace]:
    """`loops` loops, each row's from `first_B` on; reverse mode works."""
    scan = nn.scan(
        one_loop,
        variable_broadcast=SHARED,
        split_rngs={"params": False},
        in_axes=(0, nn.broadcast),
        length=loops,
    )
    return scan(cell, carry, first_B + jnp.arange(loops, dtype=jnp.int32)[:, None], inputs)


def _truncated(
    one_loop: OneLoop, cell: RecurrentCell, carry: Carry, limit_B: jax.Array, k: int, inputs: LoopInputs
) -> tuple[Carry, Trace]:
    """Truncated backpropagation through depth (Huginn, arXiv 2502.05171, section 3.3): each row's loops but the last
    k without gradient, under a while loop of traced length, then k with. Rows that are done are carried unchanged.

    With ACT every loop's output counts, so all loops have gradients and k must be a bound on them.
    """
    first_B = jnp.maximum(limit_B - k, 0)
    if carry.readout_BTD is None:
        before, _ = _while(one_loop, cell, carry, first_B, inputs.replace(limit=first_B[:, None]))
        before = jax.lax.stop_gradient(before)
        carry = before.replace(
            # Rows whose every loop has a gradient keep that of the state they start from.
            state_BTD=jnp.where((first_B > 0)[:, None, None], before.state_BTD, carry.state_BTD),
            # `halted` says who reached the limit of the first phase; in the second nobody has yet.
            halted_BT=carry.halted_BT,
        )
    return _scan(one_loop, cell, carry, first_B, k, inputs)


def _while(
    one_loop: OneLoop,
    cell: RecurrentCell,
    carry: Carry,
    limit: jax.Array,
    inputs: LoopInputs,
    reader: Reader | None = None,
    first: int = 0,
) -> tuple[Carry, jax.Array]:
    """Loops `first` to max(limit), ending early when every token has halted; also returns the one it ended before."""
    rows = carry.loops_BT.shape[0]
    # Without a policy every row runs its limit: tokens whose ACT has halted still have keys and values to remember.
    early = inputs.halting is not None

    def go_on(_, state):
        t, carry = state
        more = t < limit.max()
        return more & ~carry.halted_BT.all() if early else more

    def body(cell, state):
        t, carry = state
        carry, _ = one_loop(cell, carry, jnp.full(rows, t, jnp.int32), inputs)
        if reader is not None:
            reading, met_BT = reader.look(inputs.halting, carry.reading, carry.state_BTD, t)
            halted_BT = carry.halted_BT | (met_BT & (t + 1 >= inputs.halting.min_loops))
            carry = carry.replace(reading=reading, halted_BT=halted_BT)
        return t + 1, carry

    t, carry = nn.while_loop(
        go_on,
        body,
        cell,
        (jnp.int32(first), carry),
        broadcast_variables=SHARED,
        split_rngs={"params": False},
    )
    return carry, t
