"""What a token carries from loop to loop, and what a call of the loop reports.

Every array of a `TokenState` is [B, T, ...]. Rows and tokens of several calls can therefore be gathered, joined and
split like any other arrays, and resumed at different loops; what they attend to is in the cache.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.cache import KV, Cache
from mythos_jax.model.moe import RouterStats


class TokenInputs(struct.PyTreeNode):
    """What `begin` decides about a token; no loop changes it.

    tokens_BT: int32 token ids. injected_BTD: the prelude's output e, injected into every loop. index_BT: int32, where
    the token is in the cache (None without a cache). positions_BT: int32 positions for RoPE (None: the index, or
    0, 1, … without a cache). segments_BT: int32 segment of each token, 0 is padding (None: one segment, no padding).
    """

    tokens_BT: jax.Array
    injected_BTD: jax.Array
    index_BT: jax.Array | None
    positions_BT: jax.Array | None
    segments_BT: jax.Array | None

    @property
    def active_BT(self) -> jax.Array:
        """Bool [B, T], false on padding."""
        return jnp.ones_like(self.tokens_BT, bool) if self.segments_BT is None else self.segments_BT != 0


class ActState(struct.PyTreeNode):
    """Running sums of adaptive computation time, float32 (arXiv 1603.08983).

    readout_BTD: sum of weight times state over the loops so far. probability_BT: cumulative halting probability; 1
    once the token has taken its remainder.
    """

    readout_BTD: jax.Array
    probability_BT: jax.Array


class ProbeState(struct.PyTreeNode):
    """What the coda made of the current state, for halting criteria that compare logits from loop to loop.

    features_BTD: the features before the head. measure_BT: float32, what the criterion measured in the last loop.
    """

    features_BTD: jax.Array
    measure_BT: jax.Array


class TokenState(struct.PyTreeNode):
    """Tokens between two loops.

    inputs: fixed by `begin`. state_BTD: the recurrent state h. halted_BT: bool, the token's loops have ended.
    loops_BT: int32, loops that contributed to the token. act: sums of models with ACT read-out. survival: float32, of
    models with an exit gate, the probability that the token has not exited in the loops so far. exit_kv: for each
    layer of the loop, keys and values of the token's last loop, where a halted token is frozen. probe: where the
    halting criterion looks at logits. Fields that a model or a call does not need are None.
    """

    inputs: TokenInputs
    state_BTD: jax.Array
    halted_BT: jax.Array
    loops_BT: jax.Array
    act: ActState | None = None
    survival_BT: jax.Array | None = None
    exit_kv: tuple[KV, ...] | None = None
    probe: ProbeState | None = None

    @property
    def readout_BTD(self) -> jax.Array:
        """What the coda reads: the last state, or ACT's weighted sum of states."""
        return self.state_BTD if self.act is None else self.act.readout_BTD.astype(self.state_BTD.dtype)

    def rows(self, index: Any) -> "TokenState":
        """The rows at `index` (anything that indexes an array's first axis by slice or array)."""
        return jax.tree.map(lambda x: x[index], self)

    def tokens(self, index: Any) -> "TokenState":
        """The tokens of every row at `index` along T."""
        return jax.tree.map(lambda x: x[:, index], self)

    @staticmethod
    def join(parts: Sequence["TokenState"], axis: int = 1) -> "TokenState":
        """Tokens of several calls next to each other along T, or along B with `axis` 0."""
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis), *parts)


class Trace(struct.PyTreeNode):
    """What the loops of one call report.

    router: sums over the loops for each layer of the loop, [loop_layers, ...] (None where the model is dense). The
    others exist for a fixed number of loops, float32 [L, B, T], else None. change: |h_t - h_(t-1)| / |h_t|.
    halt_probability, act_weight: ACT's p and the weight of each loop's state. halt_probability also: of an exit gate,
    the probability that a token which has come so far exits here; halt_logit: the gate before its sigmoid.
    state: h_t [L, B, T, D], only on request. A row that has run all its loops repeats its last state.
    """

    router: RouterStats | None = None
    change_LBT: jax.Array | None = None
    halt_probability_LBT: jax.Array | None = None
    halt_logit_LBT: jax.Array | None = None
    act_weight_LBT: jax.Array | None = None
    state_LBTD: jax.Array | None = None


class Aux(struct.PyTreeNode):
    """What objectives and reports read. The arrays over loops exist for a fixed number of loops, else they are None.

    injected: the prelude's output e [B, T, D]. expert_load: tokens sent to each expert, float32 [loop_layers, E].
    router_z: mean squared log-partition of each layer's router, float32 [loop_layers].
    change: |h_t - h_(t-1)| / |h_t|; halt_probability and act_weight: ACT's p and weights; halt_logit: the exit gate's;
    all float32 [L, B, T]. state: h_t [L, B, T, D], only on request.
    """

    injected_BTD: jax.Array
    expert_load: jax.Array | None
    router_z: jax.Array | None
    change_LBT: jax.Array | None
    halt_probability_LBT: jax.Array | None
    halt_logit_LBT: jax.Array | None
    act_weight_LBT: jax.Array | None
    state_LBTD: jax.Array | None


class Output(struct.PyTreeNode):
    """What a call of the model returns.

    logits: float32 [B, T, V], None if they were left out. features: [B, T, D] before the head. loops: int32 [B, T],
    loops that contributed to each token. state: [B, T, D], what the coda received. cache: the updated cache, if one
    was given.
    """

    logits: jax.Array | None
    features: jax.Array
    loops: jax.Array
    state: jax.Array
    aux: Aux
    cache: Cache | None


def make_inputs(
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None,
    segments_BT: jax.Array | None,
    cache: Cache | None,
) -> TokenInputs:
    """Checks the tokens and places them after what the cache holds; `injected_BTD` is still to come."""
    chex.assert_rank(tokens_BT, 2)
    chex.assert_type(tokens_BT, int)
    T = tokens_BT.shape[1]
    if T > config.max_seq_len:
        raise ValueError(f"tokens: got {T} positions, allowed: at most max_seq_len, {config.max_seq_len}")
    # Padding gets a place as well; the next tokens of its row overwrite it before anybody attends to it.
    index_BT = None
    if cache is not None:
        index_BT = cache.length_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    # e is still to come: the prelude, which makes it, needs the rest of the inputs.
    nothing_BTD = jnp.zeros((*tokens_BT.shape, 0))
    return TokenInputs(tokens_BT, nothing_BTD, index_BT, positions_BT, segments_BT)


def start_tokens(
    config: ModelConfig, inputs: TokenInputs, given: jax.Array | str | None, key: jax.Array | None
) -> TokenState:
    """Tokens before their first loop; `given` and `key` as in `initial_state`."""
    shape, state_BTD = inputs.tokens_BT.shape, initial_state(config, inputs.injected_BTD, given, key)
    # Sums of ACT are float32: with many loops, weights are small and bfloat16 would drop them.
    act = ActState(jnp.zeros(state_BTD.shape), jnp.zeros(shape)) if config.readout == "act" else None
    survival_BT = jnp.ones(shape) if config.exit_gate else None
    return TokenState(inputs, state_BTD, jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), act, survival_BT)


def take_remainder(tokens: TokenState) -> TokenState:
    """Gives the ACT weight that running tokens have not spent to their current state, as if this loop were their
    last; without ACT, the tokens as they are."""
    act = tokens.act
    if act is None:
        return tokens
    # 0 for tokens that took it in their last loop: their cumulative probability was set to 1 then.
    rest_BT = jnp.maximum(1 - act.probability_BT, 0) * ~tokens.halted_BT
    readout_BTD = act.readout_BTD + rest_BT[..., None] * tokens.state_BTD.astype(jnp.float32)
    return tokens.replace(act=ActState(readout_BTD, jnp.where(tokens.halted_BT, act.probability_BT, 1.0)))


def make_aux(inputs: TokenInputs, trace: Trace, experts_per_token: int) -> Aux:
    """What a call reports, from the traces of its loops."""
    load, mean_z = None, None
    if trace.router is not None:
        load = trace.router.load_E
        # Every counted token has `experts_per_token` choices, so the load also tells how many tokens were counted.
        mean_z = trace.router.z / jnp.maximum(load.sum(-1) / experts_per_token, 1)
    return Aux(
        injected_BTD=inputs.injected_BTD,
        expert_load=load,
        router_z=mean_z,
        change_LBT=trace.change_LBT,
        halt_probability_LBT=trace.halt_probability_LBT,
        halt_logit_LBT=trace.halt_logit_LBT,
        act_weight_LBT=trace.act_weight_LBT,
        state_LBTD=trace.state_LBTD,
    )


def initial_noise(config: ModelConfig, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Float32 noise to start the state from: normal, cut at 3 sigma, sigma = sqrt(2 / (5 D)) times the embedding scale
    (the "like-init" of Huginn and Parcae), unless the config gives another than the square root."""
    # The scale of the embeddings that the prelude starts from, so that the first loop sees a familiar size.
    sigma = (config.initial_noise_std or (2 / (5 * config.dim)) ** 0.5) * config.embedding_scale
    return sigma * jax.random.truncated_normal(key, -3, 3, shape)


def initial_state(
    config: ModelConfig, injected_BTD: jax.Array, given: jax.Array | str | None, key: jax.Array | None
) -> jax.Array:
    """h_0 [B, T, D] as given, else as the config says; `key` is for models that start from noise."""
    # An array is used as it is, for example to start from the state of another run.
    if given is not None and not isinstance(given, str):
        chex.assert_equal_shape([given, injected_BTD])
        return given.astype(injected_BTD.dtype)
    if given not in (None, "zeros"):
        raise ValueError(f"initial_state: got {given!r}, allowed: an array [B, T, D], 'zeros', or None")
    if given == "zeros" or config.initial_state == "zeros":
        return jnp.zeros_like(injected_BTD)
    if config.initial_state == "injected":
        return injected_BTD
    if key is None:
        raise ValueError(
            "initial_state: got none for a model that starts from noise, allowed: an array [B, T, D], 'zeros', "
            "or rngs={'state': key}"
        )
    return initial_noise(config, key, injected_BTD.shape).astype(injected_BTD.dtype)
