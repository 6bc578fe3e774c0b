"""The model: embed and prelude once, recurrent block `loops` times, coda and head once.

Shape letters: B batch, T positions, D model width, V vocabulary, L loops; H query heads, G key-value heads, K channels
of a head, S positions in the cache, R latent width (MLA); E experts, F hidden width. x_BTD is [B, T, D].
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.config import ModelConfig
from mythos_jax.model.attention import make_attention_context
from mythos_jax.model.block import TransformerBlock, apply_layers
from mythos_jax.model.cache import Cache, LayerCache, fill_skipped_loops
from mythos_jax.model.exit_probe import LogitProbe
from mythos_jax.model.gather import SCALES, stored_weight, weight_init
from mythos_jax.model.halting import MANUAL, Halting, check_expected, check_halting
from mythos_jax.model.layers import Linear, RMSNorm, compute_dtype, matrix_init
from mythos_jax.model.loop import make_context, prepare_tokens
from mythos_jax.model.predictor import PREDICTOR
from mythos_jax.model.recurrence import RecurrentBlock
from mythos_jax.model.state import (
    Output,
    TokenInputs,
    TokenState,
    Trace,
    make_aux,
    make_inputs,
    start_tokens,
    take_remainder,
)
from mythos_jax.ops.narrow import Narrow, Stored
from mythos_jax.ops.products import logits
from mythos_jax.sharding import constrain

Loops = int | jax.Array
Caches = tuple[LayerCache, ...]


def output_table(variables: Any) -> jax.Array:
    """The matrix [V, D] of the head, for losses that apply it to a few positions at a time; float32 if it is stored as
    int8."""
    name = "unembedding" if "unembedding" in variables["params"] else "embedding"
    table_VD, scale_V1 = nn.unbox(variables["params"][name]), variables.get(SCALES, {}).get(name)
    return table_VD if scale_V1 is None else Narrow(table_VD, scale_V1).widened(jnp.float32)


class Mythos(nn.Module):
    """A recurrent-depth transformer.

    A forward pass is three verbs: `begin` embeds the tokens and runs the prelude, `loop` runs any range of loops of the
    recurrent block, `finish` reads out and runs coda and head, at any depth. A fourth, `halt`, ends the loops of single
    tokens between two calls of `loop`. Between them a `TokenState` holds all that a token carries, so that depth can be
    stepped through by hand:

        m = Mythos(config).bind(variables)
        tokens, cache = m.begin(tokens_BT, cache=None)
        for t in range(8):
            tokens, cache, _ = m.loop(tokens, cache, loops=8, start=t, count=1)
            out = m.finish(tokens, cache)  # out.logits after loop t; out.cache, after the last, for the next tokens

    gather_per_loop: on a mesh that shards the loop's weights, gather them in each loop and not once before the first.
    """

    config: ModelConfig
    gather_per_loop: bool = False

    def setup(self):
        c = self.config
        init, table = matrix_init(c.std, "vocab", "embed"), weight_init(c.std, ("vocab", "embed"), inputs=(1,))
        self.embedding = self.param("embedding", table, (c.vocab_size, c.dim), jnp.float32)
        shape = (c.vocab_size, c.n_kv_heads * c.gqa_head_dim)
        self.value_tables = {i: self.param(f"value_table_{i}", init, shape, jnp.float32) for i in c.value_table_layers}
        self.prelude = [TransformerBlock(c, i) for i in range(c.prelude_layers)]
        if c.prelude_norm:
            self.prelude_norm = RMSNorm(c.norm_eps)
        self.recurrence = RecurrentBlock(c, self.gather_per_loop)
        if c.readout_projection:
            self.readout_projection = Linear((c.dim,), ("embed", "mlp"), c.std)
        self.coda = [TransformerBlock(c, c.prelude_layers + c.loop_layers + i) for i in range(c.coda_layers)]
        if c.final_norm:
            self.final_norm = RMSNorm(c.norm_eps)  # before the head; with readout_norm also before the coda
        if not c.tied_embedding:
            self.unembedding = self.param("unembedding", table, (c.vocab_size, c.dim), jnp.float32)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        loops: Loops | None = None,
        halting: Halting | None = None,
        initial_state: jax.Array | str | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits and everything that led to them.

        tokens_BT: int32. loops and halting as in `loop`, the other arguments as in `begin`. Raises ValueError for
        arguments that the model does not support.
        """
        tokens, cache = self.begin(tokens_BT, initial_state, positions, segment_ids, cache)
        tokens, cache, trace = self.loop(tokens, cache, loops=loops, halting=halting)
        return self.finish(tokens, cache, trace)

    def begin(
        self,
        tokens_BT: jax.Array,
        initial_state: jax.Array | str | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[TokenState, Cache | None]:
        """Embeds the tokens and runs the prelude: gives e, injected into every loop, and h_0, the state before them.

        tokens_BT: int32. initial_state: [B, T, D], or "zeros"; models that start from noise need it, or
        rngs={"state": key}. positions: int32 [B, T] for RoPE; default: 0, 1, … or, with a cache, those that follow
        what it holds. segment_ids: int32 [B, T]; tokens attend to their own segment only (with a cache there is one
        segment). Segment 0 is padding, which must be at the end of a row and is never attended to. cache: from
        `init_cache`; the `length_B` of the one that is returned includes these tokens.
        """
        c = self.config
        inputs = make_inputs(c, tokens_BT, positions, segment_ids, cache)

        x_BTD = self._embed(tokens_BT) * c.embedding_scale
        x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
        x_BTD, caches = self._run_layers(self.prelude, x_BTD, inputs, cache.prelude if cache else None)
        if c.prelude_norm:
            x_BTD = self.prelude_norm(x_BTD)
        if cache is not None:
            # The next tokens come after these, whose positions in the cache are in `inputs`.
            length_B = cache.length_B + inputs.active_BT.sum(-1, dtype=jnp.int32)
            cache = cache.replace(prelude=caches, length_B=length_B)
        # Weights do not depend on h_0, so initialising needs no key for it.
        given = "zeros" if initial_state is None and self.is_initializing() else initial_state
        key = self.make_rng("state") if self.has_rng("state") else None
        return start_tokens(c, inputs.replace(injected_BTD=x_BTD), given, key), cache

    def loop(
        self,
        tokens: TokenState,
        cache: Cache | None = None,
        *,
        loops: Loops | None = None,
        halting: Halting | None = None,
        start: int | jax.Array = 0,
        count: int | jax.Array | None = None,
        trace_states: bool = False,
        skip_idle: bool = False,
    ) -> tuple[TokenState, Cache | None, Trace]:
        """Runs the recurrent block on tokens that have run the loops before `start`.

        loops: the target depth, also if this call stops before it: a Python int (default: the config's), a traced
        integer, or int32 [B], one per row; with a cache, a traced depth is clamped to the loops that it has slots for.
        start: the first loop to run, counted from 0. count: how many to run now (default: all up to `loops`). Both are
        Python ints, traced, or int32 [B]: rows can be at different loops. If the count follows from Python ints and
        there is no halting, the loops are scanned and can be differentiated; otherwise a while loop runs.
        halting: tokens may stop before `loops`. Policies that look at the logits are for decoding with a cache, one
        token at a time; a prompt of several runs all its loops. Without a cache such a policy is approximate:
        it sees a token as the coda does while the token's neighbours are still looping, not with their final states.
        trace_states: the trace of scanned loops also holds the state after each of them, [L, B, T, D].
        skip_idle: scanned loops that no row runs, where rows have depths of their own, are left out and not computed
        for nothing; the result is the same.
        """
        c, inputs, loops = self.config, tokens.inputs, self.config.loops if loops is None else loops
        first, predictor = c.prelude_layers, self.variables.get(PREDICTOR)
        value_embeddings = tuple(self._value_embeddings(inputs.tokens_BT, first + i) for i in range(c.loop_layers))
        context = make_context(c, inputs, value_embeddings, predictor, cache, loops, halting, start, count)
        skip_idle = skip_idle and context.freeze == "finished" and context.count is not None
        context = context.replace(trace_states=trace_states, skip_idle=skip_idle)
        probe = self._probe(inputs, context.halting)
        tokens, loop_caches, coda_caches, trace = self.recurrence(
            prepare_tokens(c, tokens, context, probe),
            cache.loop if cache else (LayerCache(),) * c.loop_layers,
            cache.coda if cache else (LayerCache(),) * c.coda_layers,
            context,
            probe,
        )
        return tokens, cache.replace(loop=loop_caches, coda=coda_caches) if cache else None, trace

    def halt(
        self, tokens: TokenState, cache: Cache | None, halts_BT: jax.Array, ended: int | jax.Array
    ) -> tuple[TokenState, Cache | None]:
        """Ends the loops of tokens that run them under `Halting("manual")`: later loops leave them as they are.

        halts_BT: bool [B, T]; tokens that have halted already stay so. ended: int32 [] or [B], how many loops the other
        tokens of the row have run. With a cache, their keys and values of the last loop are written for the loops that
        they skip, in which deeper tokens will look for them. Raises ConfigError for a model that cannot be halted by
        hand, and ValueError for tokens that have run no loop under that policy.
        """
        check_halting(self.config, Halting(MANUAL), cached=cache is not None)
        if tokens.exit_kv is None:
            raise ValueError("halt: got tokens that have run no loop with Halting('manual'), allowed: those that have")
        if cache is not None:
            index_BT, new_BT = tokens.inputs.index_BT, halts_BT & ~tokens.halted_BT
            assert index_BT is not None, "begin was given no cache"
            ended = jnp.asarray(ended, jnp.int32)
            cache = cache.replace(loop=fill_skipped_loops(cache.loop, tokens.exit_kv, ended, index_BT, new_BT))
        return tokens.replace(halted_BT=tokens.halted_BT | halts_BT), cache

    def finish(
        self, tokens: TokenState, cache: Cache | None = None, trace: Trace | None = None, *, logits: bool = True
    ) -> Output:
        """Reads out the tokens as they are now, whatever loop they are at, and runs the coda and the head.

        trace: of `loop`, for `aux`. logits: false leaves out the head, for losses that never build [B, T, V].
        """
        c = self.config
        tokens = take_remainder(tokens) if c.act_remainder else tokens  # unspent ACT weight goes to the current state
        state_BTD, features_BTD, caches = self._coda(tokens.readout_BTD, tokens.inputs, cache.coda if cache else None)
        if tokens.probe is not None:
            # The criterion, never one of ACT, has run the coda on this very state; jit drops the run above as unused.
            features_BTD, caches = tokens.probe.features_BTD, cache.coda if cache else caches
        return Output(
            logits=self.head(features_BTD) if logits else None,
            features=features_BTD,
            loops=tokens.loops_BT,
            state=state_BTD,
            aux=make_aux(tokens.inputs, trace or Trace(), c.experts_per_token),
            cache=cache.replace(coda=caches) if cache else None,
        )

    def expected(
        self, tokens_BT: jax.Array, *, loops: Loops | None = None, logits: bool = True, **begin: Any
    ) -> Output:
        """All loops, read out as the sum over t of p_t logits_t, where p_t is the exit gate's probability to exit after
        loop t and the last loop has what is left (`use_weighted_exit` of Ouro).

        The head is linear, so it is applied once, to the sum of p_t features_t; these are the `features` that are
        returned. loops: as in `loop`; logits: as in `finish`; other keywords as in `begin`. Raises ConfigError for a
        model without an exit gate.
        """
        check_expected(self.config)
        loops = self.config.loops if loops is None else loops
        tokens, _ = self.begin(tokens_BT, **begin)
        # As in `_probe`: a lifted loop could not call the methods of this module.
        model, variables = Mythos(self.config, parent=None), self.variables

        def add_loop(t: jax.Array, carry: tuple[TokenState, jax.Array]) -> tuple[TokenState, jax.Array]:
            before, sum_BTD = carry
            after: Any = model.apply(variables, before, loops=loops, start=t, count=1, method="loop")[0]
            read_out: Any = model.apply(variables, after, logits=False, method="finish")
            # A row that has run all its loops survives as before, so that nothing is added.
            last_B1 = jnp.reshape(jnp.asarray(loops) == t + 1, (-1, 1))
            survival_BT: Any = before.survival_BT
            p_BT = survival_BT - jnp.where(last_B1, 0, after.survival_BT)
            return after, sum_BTD + p_BT[..., None] * read_out.features.astype(jnp.float32)

        first = tokens, jnp.zeros(tokens.state_BTD.shape)
        tokens, sum_BTD = jax.lax.fori_loop(0, loops if isinstance(loops, int) else jnp.max(loops), add_loop, first)
        features_BTD = sum_BTD.astype(tokens.state_BTD.dtype)
        out = self.finish(tokens, logits=False)
        return out.replace(features=features_BTD, logits=self.head(features_BTD) if logits else None)

    def features(
        self, tokens_BT: jax.Array, *, loops: Loops | None = None, halting: Halting | None = None, **begin: Any
    ) -> jax.Array:
        """[B, T, D] before the head, for losses that never build [B, T, V]; other keywords as in `begin`."""
        tokens, cache = self.begin(tokens_BT, **begin)
        tokens, cache, _ = self.loop(tokens, cache, loops=loops, halting=halting)
        return self.finish(tokens, cache, logits=False).features

    def head(self, features_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V]."""
        table_VD = self._table("embedding" if self.config.tied_embedding else "unembedding", features_BTD.dtype)
        return constrain(logits(features_BTD, table_VD), "batch", "length", "act_vocab")

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The rows of the tokens [B, T, D], in the compute dtype."""
        dtype = compute_dtype(self.config)
        table_VD = self._table("embedding", dtype)
        if isinstance(table_VD, Narrow):  # only the rows that are read are widened
            return jax.tree.map(lambda part: jnp.take(part, tokens_BT, axis=0), table_VD).widened(dtype)
        return jnp.take(table_VD, tokens_BT, axis=0)

    def _table(self, name: str, dtype: jnp.dtype) -> Stored:
        """The embedding or the unembedding [V, D]."""
        table = stored_weight(self, name, getattr(self, name), dtype)
        return jax.tree.map(lambda part: constrain(part, "vocab", "act_embed"), table)

    def _run_layers(
        self, blocks: list[TransformerBlock], x_BTD: jax.Array, inputs: TokenInputs, caches: Caches | None
    ) -> tuple[jax.Array, Caches]:
        """The layers of the prelude or of the coda."""
        values = [self._value_embeddings(inputs.tokens_BT, block.layer) for block in blocks]
        context, no_caches = make_attention_context(self.config, inputs), (LayerCache(),) * len(blocks)
        return apply_layers(blocks, x_BTD, context, caches or no_caches, inputs.active_BT, values)[:2]

    def _coda(
        self, readout_BTD: jax.Array, inputs: TokenInputs, caches: Caches | None
    ) -> tuple[jax.Array, jax.Array, Caches]:
        """From the loop's read-out: what the coda receives, the features before the head, and the coda's caches."""
        c, x_BTD = self.config, readout_BTD
        if c.readout_norm:
            x_BTD = self.final_norm(x_BTD)
        if c.readout_projection:
            x_BTD = self.readout_projection(x_BTD)
        features_BTD, caches = self._run_layers(self.coda, x_BTD, inputs, caches)
        return x_BTD, self.final_norm(features_BTD) if c.final_norm else features_BTD, caches

    def _probe(self, inputs: TokenInputs, halting: Halting | None) -> LogitProbe | None:
        """Coda and head as functions of arrays, if the policy looks at logits."""
        if halting is None or not halting.reads_logits:
            return None
        # Inside a lifted while loop, submodules of an outer module cannot be called. A second model that is bound to
        # the same variables can: it holds no state of its own.
        model, variables = Mythos(self.config, parent=None), self.variables

        def coda(readout_BTD: jax.Array, caches: Caches) -> Any:
            return model.apply(variables, readout_BTD, inputs, caches, method="_coda")[1:]

        return LogitProbe(coda, lambda features_BTD: model.apply(variables, features_BTD, method="head"))

    def _value_embeddings(self, tokens_BT: jax.Array, layer: int) -> jax.Array | None:
        """Value embeddings [B, T, G, K] of a layer with both a table and a gate, added to its values (Parcae)."""
        c = self.config
        if layer not in c.value_table_layers or layer not in c.value_gate_layers:
            return None
        rows = jnp.take(self.value_tables[layer], tokens_BT, axis=0).astype(compute_dtype(c))
        return rows.reshape(*tokens_BT.shape, c.n_kv_heads, c.gqa_head_dim)
