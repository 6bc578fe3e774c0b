"""`ModelConfig`: one recurrent-depth transformer."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mythos_jax.bounds import Between, NonNegativeFloat, NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mythos_jax.typed import Section, check_field, first_few, marked

Attention = Literal["gqa", "mla"]
FeedForward = Literal["dense", "moe"]
Activation = Literal["swiglu", "relu2"]
NormPlacement = Literal["pre", "sandwich", "pre_post", "post"]
RopeScaling = Literal["none", "llama3"]
QKGainNorm = Literal["none", "head", "width"]
INJECTION_NAMES = ["openmythos", "parcae", "concat", "none"]  # and those of `register_injection`
Injection = Annotated[str, OneOf(INJECTION_NAMES)]
InitialState = Literal["injected", "noise", "zeros"]
LoopKV = Literal["own", "first"]
ReadOut = Literal["last", "act"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "full", "attention", "offload", "sublayers", "half_hidden", "hidden", "dots"]
Products = Literal["dtype", "int8", "fp8"]
ExpertExchange = Literal["ring", "all_to_all"]


@dataclass(frozen=True)
class Execution:
    """Marks a field that says how a model is executed, not which model it is.

    changes_rounding: results differ by rounding, not only in speed and memory.
    """

    changes_rounding: bool = False


@dataclass(frozen=True)
class Initialization:
    """Marks a field that acts on the initial weights only, and on nothing once a model is trained."""


@dataclass(frozen=True)
class ModelConfig(Section, section="model"):
    """One point in the space of recurrent-depth transformers: model families are combinations of these fields.

    Lengths are in tokens, widths in channels. Prelude and coda run once, the loop's layers `loops` times.
    """

    # Sizes.
    vocab_size: PositiveInt = 264  #: number of token ids
    dim: PositiveInt = 128  #: width of the residual stream (D)
    max_seq_len: PositiveInt = 256  #: longest context, prompt and generated tokens together
    prelude_layers: Annotated[int, Between(0, 1000)] = 1  #: layers before the loop
    loop_layers: Annotated[int, Between(1, 1000)] = 1  #: layers of one loop
    coda_layers: Annotated[int, Between(0, 1000)] = 1  #: layers after the loop
    loops: PositiveInt = 8  #: default depth, the one trained at; a call may ask for more loops or fewer

    # Attention.
    attention: Attention = "gqa"  #: grouped-query attention (`gqa`) or multi-head latent attention (`mla`)
    n_heads: PositiveInt = 4  #: query heads
    n_kv_heads: int = 4  #: gqa: key-value heads, a divisor of n_heads
    head_dim: PositiveInt | None = None  #: gqa: channels per head (default: dim / n_heads)
    rope_theta: PositiveFloat = 10_000.0  #: base of the rotary position embedding
    rope_scaling: RopeScaling = "none"  #: `llama3`: low frequencies are divided by a factor (Llama 3.1 and later)
    rope_scaling_factor: PositiveFloat = 8.0  #: llama3: the factor
    rope_low_freq_factor: PositiveFloat = 1.0  #: llama3: frequencies with fewer periods in the original context are low
    rope_high_freq_factor: PositiveFloat = 4.0  #: llama3: those with more are kept; in between, both are mixed
    rope_original_max_seq_len: PositiveInt = 8192  #: llama3: the context that the model was first trained with
    qk_norm: bool = False  #: gqa: RMS norm without a gain on queries and keys, after RoPE
    #: gqa: RMS norm with a gain on queries and keys, before RoPE: over each `head` (Qwen3), or over the `width` of all
    #: heads together (OLMo-2)
    qk_gain_norm: QKGainNorm = "none"
    qk_bias: bool = False  #: gqa: bias on queries and keys, before RoPE
    value_bias: bool = False  #: gqa: bias on values
    q_lora_rank: NonNegativeInt = 0  #: mla: width of the query latent
    kv_lora_rank: NonNegativeInt = 0  #: mla: width of the cached key-value latent (R)
    qk_nope_head_dim: NonNegativeInt = 0  #: mla: channels per head without position
    qk_rope_head_dim: NonNegativeInt = 0  #: mla: channels per head with RoPE; all heads share their key
    v_head_dim: NonNegativeInt = 0  #: mla: value channels per head

    # Feed-forward.
    feed_forward: FeedForward = "dense"  #: in the loop: dense, or a mixture of experts (`moe`); elsewhere dense
    activation: Activation = "swiglu"  #: `swiglu`, or `relu2`: 0.5 relu(x)^2 without a gate
    hidden_dim: PositiveInt = 344  #: hidden width of dense layers (F)
    loop_hidden_dim: PositiveInt | None = None  #: hidden width of dense layers in the loop (default: hidden_dim)
    n_experts: NonNegativeInt = 0  #: moe: routed experts (E)
    experts_per_token: NonNegativeInt = 0  #: moe: routed experts that each token is sent to
    expert_dim: NonNegativeInt = 0  #: moe: hidden width of a routed expert
    n_shared_experts: NonNegativeInt = 0  #: moe: experts that every token is sent to
    shared_expert_dim: PositiveInt | None = None  #: moe: hidden width of a shared expert (default: expert_dim)

    # Norms and scales.
    #: where the RMS norms of a sublayer f are: x + f(n(x)) (`pre`), n'(x + f(n(x))) (`sandwich`), x + n'(f(n(x)))
    #: (`pre_post`), or x + n(f(x)) (`post`)
    norm: NormPlacement = "pre"
    norm_eps: PositiveFloat = 1e-6  #: added to the mean square in every RMS norm
    embedding_scale: PositiveFloat = 1.0  #: factor on the embedded tokens, and on the noise of `initial_state: noise`
    prelude_norm: bool = False  #: RMS norm on the prelude's output, before it is injected
    state_norm: bool = False  #: RMS norm on the state after every loop
    final_norm: bool = True  #: RMS norm before the head
    readout_norm: bool = False  #: the final norm, with the same weights, also before the coda (Huginn)
    readout_projection: bool = False  #: linear map before the coda (Parcae's C)
    tied_embedding: bool = True  #: the head is the embedding, transposed; false: it has a matrix of its own

    # The loop.
    injection: Injection = "openmythos"  #: how the prelude's output enters each loop (docs/model.md)
    initial_state: InitialState = "injected"  #: state before the first loop: the prelude's output, noise, or zeros
    #: standard deviation of that noise, before `embedding_scale` (default: sqrt(2 / (5 dim)))
    initial_noise_std: PositiveFloat | None = None
    #: keys and values that a loop attends to: its `own`, or those of the `first` loop, so that a cache has one slot for
    #: all loops (docs/model.md)
    loop_kv: LoopKV = "own"
    loop_embedding: bool = False  #: add a sinusoid of the loop index to the first dim // 8 channels of what is injected
    loop_embedding_scale: NonNegativeFloat = 1.0  #: factor on the loop embedding
    lora_rank: NonNegativeInt = 0  #: rank of the per-loop low-rank adapter on the loop's output; 0: no adapter
    #: rows of the adapter's table, one per loop; later loops use the last (default: loops)
    lora_loops: PositiveInt | None = None

    # Read-out: what the coda receives.
    readout: ReadOut = "last"  #: the last state, or the sum of all states weighted by ACT halting probabilities (`act`)
    act_threshold: Annotated[float, Between(0, 1, "(]")] = 0.99  #: act: cumulative probability at which a token halts
    act_remainder: bool = True  #: act: the last loop gets the remaining weight; false: it is lost, as in OpenMythos
    freeze_halted: bool = True  #: act: a halted token is carried unchanged; false: its state evolves, as in OpenMythos
    exit_gate: bool = False  #: a gate on the state gives each loop's probability to be the last one (Ouro)

    # Value embeddings (Parcae), in layers that have a gate and a table.
    value_gate_layers: tuple[int, ...] = ()  #: gqa: layers with a gate; counted over prelude, loop and coda
    value_table_layers: tuple[int, ...] = ()  #: gqa: layers with a table, counted likewise

    # Initialization.
    #: standard deviation of the initial weights (default: sqrt(2 / (5 dim)))
    init_std: Annotated[PositiveFloat | None, Initialization()] = None
    #: factor on init_std for the matrices that write to the residual stream (Parcae: 0)
    output_init: Annotated[NonNegativeFloat, Initialization()] = 1.0

    # Execution.
    #: dtype of activations; `auto`: bfloat16 on TPU and GPU, float32 on CPU; parameters are always float32
    dtype: Annotated[ComputeDtype, Execution(changes_rounding=True)] = "auto"
    #: what the matrices of attention and of dense feed-forwards and the activations are rounded to where they are
    #: multiplied: `dtype`, or 8 bits with scales (docs/training.md)
    products: Annotated[Products, Execution(changes_rounding=True)] = "dtype"
    #: what the backward pass recomputes of each loop (docs/training.md)
    remat: Annotated[Remat, Execution()] = "none"
    #: how tokens reach experts on other devices (docs/sharding.md)
    expert_exchange: Annotated[ExpertExchange, Execution()] = "ring"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention == "mla":
            self._check_mla()
        else:
            self._check_gqa()
        if self.feed_forward == "moe":
            self._check_experts()
        self.check(not (self.exit_gate and self.readout == "act"), "exit_gate", "false with readout act")
        self.check(self.final_norm or not self.readout_norm, "readout_norm", "false without a final_norm")
        ordered = self.rope_low_freq_factor < self.rope_high_freq_factor
        self.check(ordered, "rope_low_freq_factor", f"less than rope_high_freq_factor, {self.rope_high_freq_factor}")
        layers = self.prelude_layers + self.loop_layers + self.coda_layers
        for name in ["value_gate_layers", "value_table_layers"]:
            for index in getattr(self, name):
                check_field(0 <= index < layers, self.dotted(name), index, f"layer indices from 0 to {layers - 1}")

    def _check_gqa(self) -> None:
        if self.head_dim is None:
            divisors = [n for n in _divisors(self.dim) if (self.dim // n) % 2 == 0]
            allowed = f"a divisor of dim {self.dim} that leaves an even head width ({first_few(divisors)})"
            self.check(self.n_heads in divisors, "n_heads", allowed)
        divides = self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads == 0
        self.check(divides, "n_kv_heads", f"a divisor of n_heads {self.n_heads}")
        self.check(self.rope_dim % 2 == 0, "head_dim", "an even width (RoPE rotates pairs of channels)")

    def _check_mla(self) -> None:
        for name in ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]:
            self.check(getattr(self, name) >= 1, name, "an integer >= 1 with mla")
        for name in ["qk_norm", "qk_bias", "value_bias"]:
            self.check(not getattr(self, name), name, "false with attention mla")
        self.check(self.qk_gain_norm == "none", "qk_gain_norm", "none with attention mla")
        self.check(self.rope_dim % 2 == 0, "qk_rope_head_dim", "an even width (RoPE rotates pairs of channels)")
        allowed = "[] with attention mla (value embeddings need attention gqa)"
        self.check(not self.value_gate_layers, "value_gate_layers", allowed)

    def _check_experts(self) -> None:
        for name in ["n_experts", "expert_dim"]:
            self.check(getattr(self, name) >= 1, name, "an integer >= 1 with feed_forward moe")
        fits = 1 <= self.experts_per_token <= self.n_experts
        self.check(fits, "experts_per_token", f"1 to n_experts, {self.n_experts}")
        self.check(self.activation == "swiglu", "activation", "swiglu with feed_forward moe")

    # What follows from the fields.

    @property
    def rope_dim(self) -> int:
        """Channels per head that RoPE rotates."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.gqa_head_dim

    @property
    def gqa_head_dim(self) -> int:
        """Channels per head with attention gqa."""
        return self.head_dim or self.dim // self.n_heads

    @property
    def std(self) -> float:
        """Standard deviation of initial weights; by default sqrt(2 / (5 D)), the "small init" of arXiv 1910.05895."""
        return self.init_std or math.sqrt(2 / (5 * self.dim))

    @property
    def output_std(self) -> float:
        """Standard deviation of the initial weights that write to the residual stream: the last matrices of attention
        and of the feed-forward."""
        return self.output_init * self.std

    @property
    def definition(self) -> "ModelConfig":
        """The same model with the default execution: what its parameters and their shapes depend on."""
        return dataclasses.replace(self, **_DEFAULT_EXECUTION)

    def compute_dtype(self, platform: str) -> Literal["float32", "bfloat16"]:
        """The dtype of activations on "cpu", "gpu" or "tpu"."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if platform == "cpu" else "bfloat16"


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


# Fields that say how a model is executed, and those among them that change nothing but speed and memory.
EXECUTION_FIELDS = tuple(name for name, _ in marked(ModelConfig, Execution))
SPEED_FIELDS = tuple(name for name, marker in marked(ModelConfig, Execution) if not marker.changes_rounding)
# Fields that act on nothing once a model is trained.
INITIALIZATION_FIELDS = tuple(name for name, _ in marked(ModelConfig, Initialization))

_DEFAULT_EXECUTION: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in EXECUTION_FIELDS
}
