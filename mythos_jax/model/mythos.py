"""The model: embed, prelude once, recurrent block `loops` times, coda once, logits."""

import dataclasses
from functools import cache
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.attention import View
from mythos_jax.model.block import TransformerBlock
from mythos_jax.model.cache import Cache, Memory
from mythos_jax.model.halting import Halting, Reader, check_halting
from mythos_jax.model.layers import Linear, RMSNorm, compute_dtype, matrix_init, rope_tables
from mythos_jax.model.moe import RouterStats
from mythos_jax.model.predictor import COLLECTION, predicted_loops
from mythos_jax.model.recurrence import Paused, RecurrentBlock
from mythos_jax.ops.attention import Mask
from mythos_jax.sharding import axis_size, constrain


@struct.dataclass
class Aux:
    """What objectives and reports read. Traces exist of loops with gradients only, else None.

    injected: the prelude's output e [B, T, D]. expert_load: tokens sent to each expert, float32 [loop_layers, E].
    router_z: mean squared log-partition of each layer's router, float32 [loop_layers].
    change: |h_t - h_(t-1)| / |h_t|; halt_probability and act_weight: ACT's p and weights; all float32 [L, B, T].
    """

    injected_BTD: jax.Array
    expert_load: jax.Array | None
    router_z: jax.Array | None
    change_LBT: jax.Array | None
    halt_probability_LBT: jax.Array | None
    act_weight_LBT: jax.Array | None


@struct.dataclass
class Output:
    """What a call of the model returns.

    logits: float32 [B, T, V] (None from `trunk`). features: [B, T, D] before the head. loops: int32 [B, T], loops
    that contributed to each token. state: [B, T, D], what the coda received. cache: the updated cache, if one came in.
    paused: the tokens to resume from, if the call was to pause.
    """

    logits: jax.Array | None
    features: jax.Array
    loops: jax.Array
    state: jax.Array
    aux: Aux
    cache: Cache | None
    paused: Paused | None


class Mythos(nn.Module):
    """A recurrent-depth transformer; `config` says which."""

    config: ModelConfig

    def setup(self):
        c = self.config
        init = matrix_init(c.std, "vocab", "embed")
        self.embedding = self.param("embedding", init, (c.vocab_size, c.dim), jnp.float32)
        width = c.n_kv_heads * c.gqa_head_dim if c.value_table_layers else 0
        self.value_tables = {
            layer: self.param(
                f"value_table_{layer}", matrix_init(c.std, "vocab", "embed"), (c.vocab_size, width), jnp.float32
            )
            for layer in c.value_table_layers
        }
        self.prelude = [TransformerBlock(c, i) for i in range(c.prelude_layers)]
        if c.prelude_norm:
            self.prelude_norm = RMSNorm(c.norm_eps)
        self.recurrence = RecurrentBlock(c)
        if c.readout_projection:
            self.readout_projection = Linear((c.dim,), ("embed", "mlp"), c.std)
        self.coda = [TransformerBlock(c, c.prelude_layers + c.loop_layers + i) for i in range(c.coda_layers)]
        self.final_norm = RMSNorm(c.norm_eps)

    def __call__(self, tokens_BT: jax.Array, **keywords: Any) -> Output:
        """Logits and all that led to them.

        tokens_BT: int32. Keywords:
          loops          Python int (default: the config's), traced integer, or int32 [B]; with a Python int and no
                         halting the loop is a scan and can be differentiated, otherwise a while loop
          backprop_loops Python int, for training with loops [B]: a row's last so many loops have gradients
          gather_per_loop for training: weights that the mesh cuts are gathered in each loop (docs/sharding.md)
          halting        a `Halting` policy: tokens may stop before `loops`. One that looks at the logits is for single
                         tokens with a cache: several (a prompt) then run all loops; without a cache it is approximate
          initial_state  [B, T, D], or "zeros"; needed as such, or as rngs={"state": key}, where the config says noise
          positions      int32 [B, T] for RoPE; default: 0, 1, … or, with a cache, on from what it holds
          segment_ids    int32 [B, T]; tokens see only their own segment (with a cache there is one segment); 0 is
                         padding, which must stand at the end of a row, is never attended to, and never loops under
                         halting
          cache          a `Cache` from `init_cache`: the tokens follow what it holds; traced loops are cut to its slots
          pause          Python int, with a cache: stop before this loop; coda and head read what there is by then
          resume         `Paused` tokens of earlier calls, with a cache whose length is again what it was before them:
                         they go on to `loops`, and nothing is computed twice
        Raises ValueError for a call that the model cannot follow.
        """
        out = self.trunk(tokens_BT, **keywords)
        return out.replace(logits=self.head(out.features))

    def features(self, tokens_BT: jax.Array, **keywords: Any) -> jax.Array:
        """[B, T, D] before the head, for losses that never build [B, T, V]."""
        return self.trunk(tokens_BT, **keywords).features

    def head(self, features_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] through the tied embedding."""
        table_VD = constrain(self.embedding.astype(features_BTD.dtype), "vocab", "act_embed")
        logits_BTV = jnp.einsum("BTD,VD->BTV", features_BTD, table_VD, preferred_element_type=jnp.float32)
        return constrain(logits_BTV, "batch", "length", "act_vocab")

    def trunk(
        self,
        tokens_BT: jax.Array,
        *,
        loops: int | jax.Array | None = None,
        backprop_loops: int | None = None,
        gather_per_loop: bool = False,
        halting: Halting | None = None,
        initial_state: jax.Array | str | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        pause: int | None = None,
        resume: Paused | None = None,
    ) -> Output:
        """Everything but the head; keywords as in `__call__`."""
        c = self.config
        chex.assert_rank(tokens_BT, 2)
        chex.assert_type(tokens_BT, int)
        loops = c.loops if loops is None else loops
        self._check(tokens_BT, loops, cache)
        self._check_pause(loops, cache, pause, resume)
        if halting is not None and halting.reads_logits and cache is not None and tokens_BT.shape[1] > 1:
            check_halting(c, halting, cached=True)
            loops, halting = halting.most(loops), None
        active_BT = jnp.ones_like(tokens_BT, bool) if segment_ids is None else segment_ids != 0
        view = self._view(tokens_BT, positions, segment_ids, cache)

        if resume is None:
            injected_BTD, prelude_memory = self._prelude(tokens_BT, view, cache, active_BT)
            start_BTD = self._initial_state(injected_BTD, initial_state)
        else:
            injected_BTD, prelude_memory, start_BTD = resume.injected_BTD, cache.prelude, resume.state_BTD

        first = c.prelude_layers
        x_BTD, carry, trace, paused = self.recurrence(
            injected_BTD,
            start_BTD,
            loops=loops,
            backprop_loops=backprop_loops,
            gather_per_loop=gather_per_loop,
            halting=halting,
            view=view,
            memory=cache.loop if cache else [Memory()] * c.loop_layers,
            slots=cache.loop_slots if cache else None,
            bounded=bool(cache and cache.bounded),
            active_BT=active_BT,
            values=[self._values(tokens_BT, first + i) for i in range(c.loop_layers)],
            predicted_BT=self._predicted(injected_BTD, halting),
            pause=pause,
            resume=resume,
            reader=self._reader(view, cache, active_BT, tokens_BT) if halting and halting.reads_logits else None,
        )
        state_BTD = self._handed_over(x_BTD)
        if carry.reading is None:
            features_BTD, coda_memory = self._coda(x_BTD, view, cache and cache.coda, active_BT, tokens_BT)
        else:
            features_BTD, coda_memory = carry.reading.features_BTD, carry.reading.memory

        if cache is not None:
            cache = cache.replace(
                prelude=prelude_memory,
                loop=carry.memory,
                coda=coda_memory,
                length_B=cache.length_B + active_BT.sum(-1, dtype=jnp.int32),
            )
        return Output(
            logits=None,
            features=features_BTD,
            loops=carry.loops_BT,
            state=state_BTD,
            aux=Aux(
                injected_BTD=injected_BTD,
                expert_load=carry.router and carry.router.load_E,
                router_z=carry.router and _mean_z(carry.router, c.experts_per_token),
                change_LBT=trace and trace.change_BT,
                halt_probability_LBT=trace and trace.halt_probability_BT,
                act_weight_LBT=trace and trace.act_weight_BT,
            ),
            cache=cache,
            paused=paused,
        )

    def _check(self, tokens_BT: jax.Array, loops: int | jax.Array, cache: Cache | None) -> None:
        c, T = self.config, tokens_BT.shape[1]
        if T > c.max_seq_len:
            raise ValueError(f"tokens: got {T} positions, allowed: at most max_seq_len, {c.max_seq_len}")
        if isinstance(loops, int):
            if loops < 1:
                raise ValueError(f"loops: got {loops}, allowed: an integer >= 1")
            if cache is not None and not cache.bounded and loops > cache.loop_slots:
                raise ValueError(f"loops: got {loops}, allowed: at most the {cache.loop_slots} the cache was made for")

    def _check_pause(
        self, loops: int | jax.Array, cache: Cache | None, pause: int | None, resume: Paused | None
    ) -> None:
        if pause is None and resume is None:
            return
        if cache is None or cache.bounded:
            raise ValueError("pause and resume: allowed with a cache that has a slot for each loop")
        first, most = resume.loop if resume else 0, loops if isinstance(loops, int) else cache.loop_slots
        if not first <= (most if pause is None else pause) <= most:
            raise ValueError(
                f"pause and resume: got loop {pause or first}, allowed: up to the {most} loops of the call"
            )

    def _prelude(
        self, tokens_BT: jax.Array, view: View, cache: Cache | None, active_BT: jax.Array
    ) -> tuple[jax.Array, tuple[Memory, ...]]:
        """What is injected, e [B, T, D], and the prelude's memory."""
        c = self.config
        table_VD = constrain(self.embedding.astype(compute_dtype(c)), "vocab", "act_embed")
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0) * c.embedding_scale
        x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
        x_BTD, memory = self._run(self.prelude, x_BTD, view, cache and cache.prelude, active_BT, tokens_BT)
        return self.prelude_norm(x_BTD) if c.prelude_norm else x_BTD, memory

    def _predicted(self, injected_BTD: jax.Array, halting: Halting | None) -> jax.Array | None:
        """The loops that each token is to run, int32 [B, T], where the policy has them foreseen."""
        if halting is None or halting.criterion != "predicted":
            return None
        predictor = self.variables.get(COLLECTION)
        if predictor is None:
            raise ConfigError(
                "halting criterion: got 'predicted' for weights without a predictor; `mythos predictor RUN` trains one"
            )
        return predicted_loops(predictor, injected_BTD, halting.threshold)

    def _view(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: Cache | None,
    ) -> View:
        """Positions, masks and cache places, made once for all layers and loops."""
        c = self.config
        index_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        if cache is not None:
            index_BT = cache.length_B[:, None] + index_BT
            mask = Mask(index_BT=index_BT)
        else:
            mask = Mask(segments_BT=segment_ids)
        rope = rope_tables(index_BT if positions is None else positions, c.rope_dim, c.rope_theta)
        return View(rope=rope, mask=mask, index_BT=index_BT if cache else None)

    def _run(self, blocks, x_BTD, view, memories, active_BT, tokens_BT) -> tuple[jax.Array, tuple[Memory, ...]]:
        """Layers one after the other; used for prelude and coda."""
        kept = []
        for block, memory in zip(blocks, memories or [Memory()] * len(blocks), strict=True):
            x_BTD, memory, _ = block(x_BTD, view, memory, active_BT, self._values(tokens_BT, block.layer))
            kept.append(memory)
        return x_BTD, tuple(kept)

    def _handed_over(self, x_BTD: jax.Array) -> jax.Array:
        """From the loop's read-out to what the coda receives."""
        if self.config.readout_norm:
            x_BTD = self.final_norm(x_BTD)
        return self.readout_projection(x_BTD) if self.config.readout_projection else x_BTD

    def _coda(self, x_BTD, view, memories, active_BT, tokens_BT) -> tuple[jax.Array, tuple[Memory, ...]]:
        """From the loop's read-out to the features before the head, and the coda's memory."""
        x_BTD, memory = self._run(self.coda, self._handed_over(x_BTD), view, memories, active_BT, tokens_BT)
        return self.final_norm(x_BTD), memory

    def _reader(self, view: View, cache: Cache | None, active_BT: jax.Array, tokens_BT: jax.Array) -> Reader:
        """Coda and head as functions of arrays: inside a while loop modules of the outside cannot be called."""
        model, variables = Mythos(self.config, parent=None), self.variables

        def read(x_BTD, memories):
            return model.apply(variables, x_BTD, view, memories, active_BT, tokens_BT, method="_coda")

        def head(features_BTD):
            return model.apply(variables, features_BTD, method="head")

        return Reader(read, head, memory=cache.coda if cache else (Memory(),) * self.config.coda_layers)

    def _values(self, tokens_BT: jax.Array, layer: int) -> jax.Array | None:
        """This layer's value embeddings [B, T, G, K], where it has both a table and a gate (Parcae)."""
        c = self.config
        if layer not in c.value_table_layers or layer not in c.value_gate_layers:
            return None
        rows = jnp.take(self.value_tables[layer], tokens_BT, axis=0).astype(compute_dtype(c))
        return rows.reshape(*tokens_BT.shape, c.n_kv_heads, c.gqa_head_dim)

    def _initial_state(self, injected_BTD: jax.Array, given: jax.Array | str | None) -> jax.Array:
        c = self.config
        if given is not None and not isinstance(given, str):
            chex.assert_equal_shape([given, injected_BTD])
            return given.astype(injected_BTD.dtype)
        if given not in (None, "zeros"):
            raise ValueError(f"initial_state: got {given!r}, allowed: an array [B, T, D], 'zeros', or None")
        if given == "zeros" or c.initial_state == "zeros" or self.is_initializing():
            return jnp.zeros_like(injected_BTD)
        if c.initial_state == "injected":
            return injected_BTD
        if not self.has_rng("state"):
            raise ValueError(
                "initial_state: got none for a model that starts from noise, allowed: an array [B, T, D], 'zeros', "
                "or rngs={'state': key}"
            )
        return initial_noise(c, self.make_rng("state"), injected_BTD.shape).astype(injected_BTD.dtype)


def _mean_z(stats: RouterStats, experts_per_token: int) -> jax.Array:
    return stats.z / jnp.maximum(stats.load_E.sum(-1) / experts_per_token, 1)


@cache
def abstract_variables(config: ModelConfig) -> dict[str, Any]:
    """The model's variables as boxed shapes and dtypes, with their logical axes; nothing is allocated."""
    # Shapes of weights depend neither on the tokens nor on what the backward pass keeps.
    model = Mythos(dataclasses.replace(config, remat="none"))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


def with_whole_loop(config: ModelConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """Variables whose loop weights, where the mesh in use cuts their width, are made whole before the first loop.

    Products use a copy in the compute dtype (collection `whole`); the float32 weight itself is whole only as the place
    where gradients of all loops add up, so that they are summed over devices once.
    """
    if axis_size("fsdp") * axis_size("expert") == 1:
        return variables
    params = variables["params"]
    loop = nn.unbox(params["recurrence"]["cell"])

    def gather(boxed: Any, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        names = boxed.names if isinstance(boxed, nn.LogicallyPartitioned) else (None,) * x.ndim
        return constrain(x.astype(dtype), *("act_embed" if name == "embed" else name for name in names))

    def all_as(dtype: jnp.dtype) -> Any:
        boxed = abstract_variables(config)["params"]["recurrence"]["cell"]
        is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
        return jax.tree.map(lambda b, x: gather(b, x, dtype), boxed, loop, is_leaf=is_box)

    copies = jax.lax.stop_gradient(all_as(compute_dtype(config)))
    return {
        **variables,
        "params": {**params, "recurrence": {**params["recurrence"], "cell": all_as(jnp.float32)}},
        "whole": {"recurrence": {"cell": copies}},
    }


def initial_noise(config: ModelConfig, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Float32 noise to start the state from: normal cut at 3 sigma, sigma = sqrt(2 / (5 D)) times the embedding scale
    (Huginn and Parcae's "like-init")."""
    sigma = (2 / (5 * config.dim)) ** 0.5 * config.embedding_scale
    return sigma * jax.random.truncated_normal(key, -3, 3, shape)
