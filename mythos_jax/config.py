"""The configuration of a run: typed, frozen dataclasses that check themselves.

YAML in, command-line overrides on top, resolved YAML out (`typed.py` does the reading). A rule that is broken
raises `ConfigError`, one line that names the field, what it got, and what is allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from mythos_jax.errors import ConfigError
from mythos_jax.paths import to_path
from mythos_jax.typed import (
    Formerly,
    Section,
    apply_overrides,
    check_field,
    check_types,
    first_few,
    from_dict,
    read_yaml,
    to_dict,
    upgrade,
)
from mythos_jax.version import __version__

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "MeshConfig",
    "ModelConfig",
    "TaskConfig",
    "TrainingConfig",
    "load_config",
    "load_run_config",
    "save_config",
]

Attention = Literal["gqa", "mla"]
FeedForward = Literal["dense", "moe"]
Activation = Literal["swiglu", "relu2"]
NormPlacement = Literal["pre", "sandwich"]
Injection = Literal["openmythos", "parcae", "concat", "none"]
InitialState = Literal["injected", "noise", "zeros"]
ReadOut = Literal["last", "act"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "full", "attention", "offload", "dots"]
ExpertExchange = Literal["ring", "all_to_all"]
DepthDistribution = Literal["fixed", "uniform", "poisson", "lognormal_poisson"]
DepthUnit = Literal["sequence", "batch"]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "constant"]
BadSteps = Literal["stop", "skip"]
Logger = Literal["tensorboard", "wandb"]
Gather = Literal["once", "per_loop"]


@dataclass(frozen=True)
class ModelConfig(Section, section="model"):
    """One point in the space of recurrent-depth transformers (design: families are combinations, not forks).

    Lengths are in tokens, widths in channels, `None` means "derived", as the comment beside the field says.
    """

    # Sizes.
    vocab_size: int = 264
    dim: int = 128  # D, width of the residual stream
    max_seq_len: int = 256  # longest context, prompt and generated tokens together
    # Depth: prelude once, the loop's layers `loops` times, coda once.
    prelude_layers: int = 1
    loop_layers: int = 1
    coda_layers: int = 1
    loops: int = 8  # default depth, the one trained at; a call may ask for more or fewer
    # Attention.
    attention: Attention = "gqa"
    n_heads: int = 4
    n_kv_heads: int = 4  # gqa: each serves n_heads // n_kv_heads query heads; mla: not used
    head_dim: int | None = None  # gqa: dim // n_heads
    rope_theta: float = 10_000.0
    qk_norm: bool = False  # gqa: parameter-free RMS norm on queries and keys, after RoPE
    qk_bias: bool = False  # gqa: bias on queries and keys, before RoPE
    q_lora_rank: int = 0  # mla: width of the query latent
    kv_lora_rank: int = 0  # mla: width R of the cached key-value latent
    qk_nope_head_dim: int = 0  # mla: channels per head without position
    qk_rope_head_dim: int = 0  # mla: channels per head with RoPE; their key is shared by all heads
    v_head_dim: int = 0  # mla: value channels per head
    # Feed-forward. Prelude and coda are dense; `feed_forward` is the loop's.
    feed_forward: FeedForward = "dense"
    activation: Activation = "swiglu"  # relu2: 0.5 relu(x)^2 (Parcae)
    hidden_dim: int = 344  # F, of dense layers
    loop_hidden_dim: int | None = None  # F of dense layers in the loop: hidden_dim
    n_experts: int = 0  # E, routed experts
    experts_per_token: int = 0
    expert_dim: int = 0  # F of one routed expert
    n_shared_experts: int = 0
    shared_expert_dim: int | None = None  # F of one shared expert: expert_dim
    # Norms and scales.
    norm: NormPlacement = "pre"
    norm_eps: float = 1e-6
    embedding_scale: float = 1.0
    prelude_norm: bool = False  # RMS norm on the prelude's output, before it is injected
    state_norm: bool = False  # RMS norm on the state after every loop
    readout_norm: bool = False  # the final norm, same weights, also before the coda (Huginn)
    readout_projection: bool = False  # a linear map before the coda (Parcae's C)
    # The loop.
    injection: Injection = "openmythos"
    initial_state: InitialState = "injected"
    loop_embedding: bool = False  # sinusoid of the loop index on the first dim // 8 channels
    loop_embedding_scale: float = 1.0
    lora_rank: int = 0  # per-loop low-rank adapter on the loop's output; 0: none
    lora_loops: int | None = None  # rows of its scale table, later loops use the last: loops
    # Read-out: what the coda receives.
    readout: ReadOut = "last"
    act_threshold: float = 0.99
    act_remainder: bool = True  # the last loop takes the weight that is left; the original forgets it
    freeze_halted: bool = True  # a halted token is carried unchanged; the original lets it evolve
    # Value embeddings (Parcae), by index over prelude, loop and coda layers; they act where gate and table meet.
    value_gate_layers: tuple[int, ...] = ()
    value_table_layers: tuple[int, ...] = ()
    # Numerics.
    init_std: float | None = None  # normal initialisation of every matrix: sqrt(2 / (5 dim))
    output_init: float = 1.0  # times that: of the matrices that write to the residual stream (Parcae: 0)
    dtype: ComputeDtype = "auto"  # of activations; auto: bfloat16 on TPU and GPU, float32 on CPU
    remat: Remat = "none"  # what the backward pass recomputes of each loop (docs/training.md has a table)
    expert_exchange: ExpertExchange = "ring"  # how tokens reach experts on other devices (docs/sharding.md)

    def __post_init__(self):
        check_types(self, "model")
        positive = ["vocab_size", "dim", "max_seq_len", "n_heads", "hidden_dim", "loops", "loop_layers"]
        for name in positive:
            check_field(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "an integer >= 1")
        for name in ["prelude_layers", "coda_layers", "n_shared_experts", "lora_rank"]:
            check_field(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "an integer >= 0")
        for name in ["rope_theta", "norm_eps", "embedding_scale"]:
            check_field(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "a number > 0")
        for name in ["head_dim", "loop_hidden_dim", "shared_expert_dim", "lora_loops", "init_std"]:
            value = getattr(self, name)
            check_field(value is None or value > 0, f"model.{name}", value, "a number > 0, or null")
        self._check_attention()
        self._check_feed_forward()
        check_field(0 < self.act_threshold <= 1, "model.act_threshold", self.act_threshold, "a number in (0, 1]")
        for name in ["loop_embedding_scale", "output_init"]:
            check_field(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "a number >= 0")
        layers = self.prelude_layers + self.loop_layers + self.coda_layers
        for name in ["value_gate_layers", "value_table_layers"]:
            for index in getattr(self, name):
                check_field(0 <= index < layers, f"model.{name}", index, f"layer indices from 0 to {layers - 1}")
        check_field(
            not (self.value_gate_layers and self.attention == "mla"),
            "model.value_gate_layers",
            self.value_gate_layers,
            "[] with attention mla (value embeddings need attention gqa)",
        )

    def _check_attention(self) -> None:
        if self.attention == "mla":
            for name in ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]:
                check_field(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "an integer >= 1 with mla")
            for name in ["qk_norm", "qk_bias"]:
                check_field(not getattr(self, name), f"model.{name}", True, "false with attention mla")
        else:
            if self.head_dim is None:
                divisors = [n for n in range(1, self.dim + 1) if self.dim % n == 0 and (self.dim // n) % 2 == 0]
                check_field(
                    self.n_heads in divisors,
                    "model.n_heads",
                    self.n_heads,
                    f"a divisor of dim {self.dim} that leaves an even head width ({first_few(divisors)})",
                )
            check_field(
                self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads == 0,
                "model.n_kv_heads",
                self.n_kv_heads,
                f"a divisor of n_heads {self.n_heads}",
            )
        name = "qk_rope_head_dim" if self.attention == "mla" else "head_dim"
        check_field(self.rope_dim % 2 == 0, f"model.{name}", self.rope_dim, "an even width (RoPE turns pairs)")

    def _check_feed_forward(self) -> None:
        if self.feed_forward == "moe":
            check_field(self.n_experts >= 1, "model.n_experts", self.n_experts, "an integer >= 1 with feed_forward moe")
            check_field(
                self.expert_dim >= 1, "model.expert_dim", self.expert_dim, "an integer >= 1 with feed_forward moe"
            )
            check_field(
                1 <= self.experts_per_token <= self.n_experts,
                "model.experts_per_token",
                self.experts_per_token,
                f"1 to n_experts, {self.n_experts}",
            )
            check_field(
                self.activation == "swiglu", "model.activation", self.activation, "swiglu with feed_forward moe"
            )

    # What the fields leave to be derived.
    @property
    def rope_dim(self) -> int:
        """Channels of a head that RoPE turns."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.gqa_head_dim

    @property
    def gqa_head_dim(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def std(self) -> float:
        """Standard deviation of initial weights; by default sqrt(2 / (5 D)), the "small init" of arXiv 1910.05895."""
        return self.init_std or math.sqrt(2 / (5 * self.dim))

    @property
    def output_std(self) -> float:
        """Standard deviation of the initial weights that write to the residual stream: attention's and the
        feed-forward's last matrices."""
        return self.output_init * self.std


@dataclass(frozen=True)
class DepthConfig(Section, section="training.depth"):
    """How many loops a training row runs, drawn anew each step (see `training/depth.py`)."""

    distribution: DepthDistribution = "fixed"
    mean_loops: int | None = None  # model.loops
    max_loops: int | None = None  # bound of every draw: twice the mean; fixed: the mean
    backprop_loops: int | None = None  # the last so many have gradients: all of them
    sample_per: Annotated[DepthUnit, Formerly("per")] = "sequence"  # one draw a row, or one for the whole batch
    curriculum_steps: int = 0  # the mean rises from 1 over so many steps

    def __post_init__(self):
        check_types(self, "training.depth")
        for name in ["mean_loops", "max_loops", "backprop_loops"]:
            value = getattr(self, name)
            check_field(value is None or value >= 1, f"training.depth.{name}", value, "an integer >= 1, or null")
        check_field(
            self.curriculum_steps >= 0, "training.depth.curriculum_steps", self.curriculum_steps, "an integer >= 0"
        )


@dataclass(frozen=True)
class ObjectivesConfig(Section, section="training.objectives"):
    """Weights of what is minimised beside the next-token loss; 0: off (see `training/objectives.py`)."""

    ponder_cost: float = 0.0  # the expected number of loops under the ACT weights
    ponder_prior: float = 0.0  # KL from the ACT weights to a geometric distribution …
    ponder_prior_rate: float = 0.2  # … of this halting probability a loop
    contraction: float = 0.0  # steps of the state that grow from one loop to the next
    router_z: float = 0.0  # squared log-partition of the router

    def __post_init__(self):
        check_types(self, "training.objectives")
        for name in ["ponder_cost", "ponder_prior", "contraction", "router_z"]:
            check_field(getattr(self, name) >= 0, f"training.objectives.{name}", getattr(self, name), "a number >= 0")
        rate = self.ponder_prior_rate
        check_field(0 < rate < 1, "training.objectives.ponder_prior_rate", rate, "a number in (0, 1)")


@dataclass(frozen=True)
class TrainingConfig(Section, section="training"):
    """How a run trains. Steps are optimizer steps, `batch_size` counts rows of the global batch."""

    steps: int = 1000
    batch_size: int = 16
    seed: int = 0
    grad_accumulation_steps: Annotated[int, Formerly("accumulation")] = (
        1  # parts that a batch is split into, one after the other, to save memory
    )
    depth: DepthConfig = field(default_factory=DepthConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    # Linear warm-up over `warmup_steps`, then: cosine to `final_learning_rate_fraction` of the peak; wsd: constant,
    # then linear down to it over the last `decay_fraction` of the steps; constant.
    optimizer: Optimizer = "adamw"  # muon: matrices inside the layers by Muon, the rest by AdamW
    schedule: Schedule = "cosine"
    decay_fraction: Annotated[float, Formerly("decay_share")] = 0.2
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02  # its peak; follows the same schedule
    final_learning_rate_fraction: Annotated[
        float, Formerly("final_learning_rate", "a fraction of the peak, e.g. 0.1")
    ] = 0.1  # of learning_rate
    warmup_steps: int = 50
    weight_decay: float = 0.1  # matrices only
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    gradient_clip: float = 1.0  # global norm; 0: none
    ema_decay: float = 0.0  # of an average of the weights, kept beside them and used by eval; 0: none
    bad_steps: BadSteps = "stop"  # a step that is no number or a spike: stop the run, or skip its update and count it
    spike_factor: float = 0.0  # a loss above this times its running mean is a spike; 0: none is
    balance_rate: float = 1e-3  # step of the router bias towards equal expert load (DeepSeek-V3); 0: off
    checkpoint_every: int = 500
    keep_checkpoints: int = 2  # the newest so many are kept
    log_every: int = 10
    evaluate_every: int = 0  # held-out loss at the model's depth, every so many steps; 0: never
    loggers: Annotated[tuple[Logger, ...], Formerly("writers")] = ()  # beside metrics.jsonl
    profile_steps: tuple[int, ...] = ()  # [first, last]: a profiler trace of these steps, into the run directory

    def __post_init__(self):
        check_types(self, "training")
        check_field(
            self.batch_size % self.grad_accumulation_steps == 0 if self.grad_accumulation_steps >= 1 else False,
            "training.grad_accumulation_steps",
            self.grad_accumulation_steps,
            f"a divisor of batch_size {self.batch_size}",
        )
        check_field(
            0 < self.decay_fraction <= 1, "training.decay_fraction", self.decay_fraction, "a fraction in (0, 1]"
        )
        check_field(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "a number in [0, 1)")
        factor = self.spike_factor
        check_field(factor == 0 or factor > 1, "training.spike_factor", factor, "a number > 1, or 0 for none")
        span = self.profile_steps
        ordered = not span or (len(span) == 2 and 1 <= span[0] <= span[1])
        check_field(ordered, "training.profile_steps", list(span), "[first, last], or []")
        for name in ["steps", "batch_size", "checkpoint_every", "keep_checkpoints", "log_every"]:
            check_field(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "an integer >= 1")
        for name in ["warmup_steps", "seed", "evaluate_every"]:
            check_field(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "an integer >= 0")
        for name in ["learning_rate", "muon_learning_rate", "eps"]:
            check_field(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "a number > 0")
        for name in ["weight_decay", "gradient_clip", "balance_rate"]:
            check_field(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "a number >= 0")
        for name in ["b1", "b2"]:
            check_field(0 <= getattr(self, name) < 1, f"training.{name}", getattr(self, name), "a number in [0, 1)")
        check_field(
            0 <= self.final_learning_rate_fraction <= 1,
            "training.final_learning_rate_fraction",
            self.final_learning_rate_fraction,
            "a fraction in [0, 1]",
        )


@dataclass(frozen=True)
class TaskConfig(Section, section="data.task"):
    """A reasoning task, made on the fly instead of read (data/tasks.py)."""

    name: str = ""  # one of TASKS; empty: train on text
    # What is hard: p_hop: hops; addition: numbers; parity: bits; boolean: levels. Training draws from this list.
    difficulty: tuple[int, ...] = ()
    answers: Literal["every", "last"] = "every"  # p_hop, parity: train on the answers at all places, or the last alone
    length: int = 32  # p_hop: symbols in the sequence
    alphabet: int = 4  # p_hop: different symbols
    digits: int = 3  # addition: of each number

    def __post_init__(self):
        check_types(self, "data.task")
        if not self.name:
            return
        check_field(self.name in TASKS, "data.task.name", self.name, ", ".join(TASKS))
        check_field(len(self.difficulty) > 0, "data.task.difficulty", [], "a list such as [4] or [1, 2, 3]")
        check_difficulties(self.difficulty, "data.task.difficulty")
        check_field(2 <= self.length <= 10_000, "data.task.length", self.length, "an integer from 2 to 10000")
        check_field(3 <= self.alphabet <= 10_000, "data.task.alphabet", self.alphabet, "an integer from 3 to 10000")
        check_field(1 <= self.digits <= 15, "data.task.digits", self.digits, "an integer from 1 to 15")


TASKS = ("p_hop", "addition", "parity", "boolean")


def check_difficulties(values: Sequence[int], name: str) -> None:
    """Raises ConfigError for a difficulty that no task has."""
    for value in values:
        check_field(1 <= value <= 1000, name, value, "integers from 1 to 1000")


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """Where the token rows are, and how to make them when they are missing; or a task that makes them."""

    path: str = ""  # the prepared rows; empty: data/NAME
    sources: tuple[str, ...] = ()  # files and folders to prepare from; "stdlib": Python's own library
    tokenizer: str = "bytes"  # "bytes", or a Hugging Face tokenizer.json
    seq_len: int = 128  # tokens a row predicts
    held_out_fraction: Annotated[float, Formerly("held_out")] = (
        0.05  # of the documents, kept for evaluation, chosen by a hash of the name
    )
    max_bytes: int = 0  # stop after this much text; 0: all of it
    document_mask: bool = False  # tokens attend to their own document only, not to the others in their row
    # Instead of path and sources: several prepared folders and their weights. (Unhashed, so that a config is hashable.)
    mixture: dict[str, float] = field(default_factory=dict, hash=False)
    task: TaskConfig = field(default_factory=TaskConfig)  # or nothing is read at all

    def __post_init__(self):
        check_types(self, "data")
        check_field(self.seq_len >= 1, "data.seq_len", self.seq_len, "an integer >= 1")
        check_field(
            0 <= self.held_out_fraction < 1, "data.held_out_fraction", self.held_out_fraction, "a fraction in [0, 1)"
        )
        check_field(self.max_bytes >= 0, "data.max_bytes", self.max_bytes, "an integer >= 0")
        if self.task.name:
            for name in ["path", "sources", "mixture", "document_mask"]:
                value = getattr(self, name)
                check_field(not value, f"data.{name}", value, f"nothing, with data.task.name {self.task.name}")
        if self.mixture:
            for name in ["path", "sources"]:
                check_field(not getattr(self, name), f"data.{name}", getattr(self, name), "nothing, with data.mixture")
            for folder, weight in self.mixture.items():
                check_field(weight > 0, f"data.mixture {folder}", weight, "a weight > 0")


@dataclass(frozen=True)
class EvaluationConfig(Section, section="evaluation"):
    """What `mythos eval` does by default."""

    loops: tuple[int, ...] = ()  # depths to evaluate at; empty: 1, 2, 4, … up to twice the trained depth
    batch_size: int = 32
    max_rows: int = 0  # held-out rows to use; 0: all, of a task 1024 per difficulty
    difficulties: tuple[int, ...] = ()  # of a task; empty: those trained on

    def __post_init__(self):
        check_types(self, "evaluation")
        for loops in self.loops:
            check_field(loops >= 1, "evaluation.loops", loops, "integers >= 1")
        check_field(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "an integer >= 1")
        check_field(self.max_rows >= 0, "evaluation.max_rows", self.max_rows, "an integer >= 0")
        check_difficulties(self.difficulties, "evaluation.difficulties")


@dataclass(frozen=True)
class MeshConfig(Section, section="mesh"):
    """Devices along each mesh axis; one axis may be -1 and takes what the others leave (docs/sharding.md)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1
    slices: int = 1  # TPU slices that `data` spans, joined by the data centre network; of all devices, not times them
    gather: Gather = "once"  # the loop's weights, cut by fsdp, are made whole once a step, or anew in every loop

    def __post_init__(self):
        check_types(self, "mesh")
        sizes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor", "expert", "sequence")}
        for axis, size in sizes.items():
            check_field(size == -1 or size >= 1, f"mesh.{axis}", size, "an integer >= 1, or -1 for the rest")
        check_field(self.slices >= 1, "mesh.slices", self.slices, "an integer >= 1")
        free = [axis for axis, size in sizes.items() if size == -1]
        check_field(len(free) <= 1, f"mesh.{free[-1] if free else ''}", -1, "-1 on one axis only")


@dataclass(frozen=True)
class Config(Section):
    """A whole run."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        check_types(self, "")
        check_field(
            self.data.seq_len <= self.model.max_seq_len,
            "data.seq_len",
            self.data.seq_len,
            f"at most model.max_seq_len, {self.model.max_seq_len}",
        )
        self._check_depth()
        check_field(
            self.mesh.gather == "once" or self.model.remat != "none",
            "mesh.gather",
            self.mesh.gather,
            "once with model.remat none (the backward pass would keep the whole weights of every loop)",
        )

    def _check_depth(self) -> None:
        depth, act = self.training.depth, self.model.readout == "act"
        bounded = depth.backprop_loops is not None and depth.backprop_loops < max_loops(self)
        check_field(
            not (act and bounded),
            "training.depth.backprop_loops",
            depth.backprop_loops,
            "null with readout act, which needs the output of every loop",
        )
        objectives = self.training.objectives
        for name in ["ponder_cost", "ponder_prior"]:
            check_field(
                act or not getattr(objectives, name),
                f"training.objectives.{name}",
                getattr(objectives, name),
                "0 unless model.readout is act",
            )

    @property
    def data_path(self) -> str:
        """The prepared rows; of a mixture its first part, whose tokenizer is that of all."""
        if self.data.mixture:
            return next(iter(self.data.mixture))
        return self.data.path or f"data/{self.name}"


def mean_loops(config: Config) -> int:
    """The mean of the depths drawn in training: by default the model's depth."""
    return config.training.depth.mean_loops or config.model.loops


def max_loops(config: Config) -> int:
    """The bound of every draw, and so of what a batch can cost: by default twice the mean (fixed: the mean)."""
    mean, depth = mean_loops(config), config.training.depth
    return depth.max_loops or (mean if depth.distribution == "fixed" else 2 * mean)


def backprop_loops(config: Config) -> int:
    """Loops with gradient, static: by default all that a row can run."""
    return min(config.training.depth.backprop_loops or max_loops(config), max_loops(config))


def is_static(config: Config) -> bool:
    """Whether every row of every step runs the same loops, all with gradients: then depth need not be traced."""
    depth = config.training.depth
    plain = depth.distribution == "fixed" and not depth.curriculum_steps
    return plain and backprop_loops(config) == max_loops(config) == mean_loops(config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML config. `overrides` are command-line words: `--training.steps 100` or `--training.steps=100`.

    A file that `save_config` of an earlier version wrote is upgraded. Raises ConfigError: no such file, not YAML, an
    unknown key (with the nearest known one), a wrong type or value.
    """
    tree = read_yaml(path)
    tree.setdefault("name", Path(path).stem)
    if _WRITTEN_BY in tree:
        return _from_stored(tree, tree.pop(_WRITTEN_BY), overrides)
    apply_overrides(tree, overrides)
    return from_dict(Config, tree)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config.yaml of a run directory, also of a run that an earlier version made. Raises ConfigError as above."""
    tree = read_yaml(path)
    return _from_stored(tree, tree.pop(_WRITTEN_BY, _FIRST_VERSION), overrides)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML, with the version that wrote it."""
    tree = {_WRITTEN_BY: __version__, **to_dict(config)}
    to_path(path).write_text(yaml.safe_dump(tree, sort_keys=False))


_WRITTEN_BY = "mythos_jax_version"
_FIRST_VERSION = "0.1.0"  # which did not write it


def _from_stored(tree: dict[str, Any], version: Any, overrides: Sequence[str]) -> Config:
    tree = upgrade(Config, tree)
    apply_overrides(tree, overrides)
    try:
        return from_dict(Config, tree)
    except ConfigError as error:
        if version == __version__:
            raise
        raise ConfigError(f"{error} (written by mythos_jax {version}, this is {__version__})") from None
