"""`TrainingConfig`: depth, objectives, optimizer and schedule, checkpoints, logs."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mythos_jax.bounds import (
    Between,
    Formerly,
    Gt,
    NonNegativeFloat,
    NonNegativeInt,
    Or,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from mythos_jax.typed import Section, check_field

DepthDistribution = Literal["fixed", "uniform", "poisson", "lognormal_poisson"]
Curriculum = Literal["linear", "1-sqrt"]
DepthUnit = Literal["sequence", "batch"]
Optimizer = Literal["adamw", "muon"]
MomentsDtype = Literal["float32", "bfloat16"]
Schedule = Literal["cosine", "wsd", "constant"]
ExitLoss = Literal["none", "expected", "gain"]
TeacherDtype = Literal["float32", "bfloat16"]
BadSteps = Literal["stop", "skip"]
Compiler = Literal["default", "tuned"]
Logger = Literal["tensorboard", "wandb"]
BaseDtype = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class DepthConfig(Section, section="training.depth"):
    """How many loops a training row runs, drawn anew in each step from (seed, step) alone."""

    distribution: DepthDistribution = "fixed"  #: distribution of the loops (docs/training.md)
    mean_loops: PositiveInt | None = None  #: mean of the distribution (default: model.loops)
    max_loops: PositiveInt | None = None  #: upper bound of every draw (default: twice the mean; for `fixed`, the mean)
    backprop_loops: PositiveInt | None = None  #: gradients flow through the last N loops of a row (default: all)
    #: and through no more than the mean of the step, rounded up, even in rows that run more loops (arXiv 2511.07384)
    backprop_up_to_mean: bool = False
    sample_per: Annotated[DepthUnit, Formerly("per")] = "sequence"  #: one draw per row, or one for the whole batch
    #: how the mean rises from 1, as a function of the share p of its steps: `linear`: p, or `1-sqrt`: 1 - sqrt(1 - p)
    curriculum: Curriculum = "linear"
    curriculum_steps: NonNegativeInt = 0  #: the mean rises from 1 over the first N steps; 0: constant
    #: the same as a fraction of training.steps; 0: by curriculum_steps
    curriculum_fraction: Annotated[float, Between(0, 1, noun="a fraction")] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.curriculum_steps and self.curriculum_fraction
        self.check(not both, "curriculum_fraction", "0 with curriculum_steps, which says the same in steps")


@dataclass(frozen=True)
class ObjectivesConfig(Section, section="training.objectives"):
    """Weights of the terms that are added to the next-token loss, and how an exit gate is trained. Each term is a mean
    over tokens; 0: off."""

    ponder_cost: NonNegativeFloat = 0.0  #: expected number of loops under the ACT weights; needs `readout: act`
    ponder_prior: NonNegativeFloat = 0.0  #: KL from the ACT weights to a geometric distribution; needs `readout: act`
    #: halting probability per loop of that distribution; 0: uniform over the loops
    ponder_prior_rate: Annotated[float, Between(0, 1, "[)")] = 0.2
    contraction: NonNegativeFloat = 0.0  #: steps of the state that grow from one loop to the next
    router_z: NonNegativeFloat = 0.0  #: squared log-partition function of the router

    #: how an exit gate is trained (docs/training.md): `none`: not at all; `expected`: with the model, whose loss is the
    #: mean over the exits; `gain`: alone, to go on while loops lower the loss; needs `exit_gate: true`
    exit_loss: ExitLoss = "none"
    exit_entropy: NonNegativeFloat = 0.1  #: expected: weight of the KL from the exits to the prior below
    #: expected: exit probability per loop of a geometric prior; 0: uniform, so that the entropy of the exits is raised
    exit_prior_rate: Annotated[float, Between(0, 1, "[)")] = 0.0
    exit_gain: NonNegativeFloat = 0.005  #: gain: decrease of the loss, in nats, that makes a loop worth running
    exit_slope: PositiveFloat = 50.0  #: gain: slope of the label sigmoid(slope (decrease - exit_gain))


@dataclass(frozen=True)
class LoraConfig(Section, section="training.lora"):
    """LoRA fine-tuning (docs/finetuning.md): low-rank weights beside matrices of `training.init_from`, which stay as
    they are. This is not the loop's own `model.lora_rank`."""

    rank: NonNegativeInt = 0  #: rank of the low-rank weights, the only ones that are trained; 0: off
    alpha: PositiveFloat | None = None  #: what they add is scaled by alpha / rank (default: twice the rank)
    #: names of the matrices that get them, as in `training.frozen`; empty: all of attention and feed-forward
    targets: tuple[str, ...] = ()
    base_dtype: BaseDtype = "float32"  #: how the weights that stay are stored; int8: matrices, with scales

    def __post_init__(self) -> None:
        super().__post_init__()
        unset = {"alpha": self.alpha is None, "targets": not self.targets, "base_dtype": self.base_dtype == "float32"}
        for name, default in {"alpha": "null", "targets": "[]", "base_dtype": "float32"}.items():
            self.check(self.rank > 0 or unset[name], name, f"{default} without training.lora.rank")

    @property
    def resolved_alpha(self) -> float:
        """alpha, or its default."""
        return self.alpha or 2.0 * self.rank

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.resolved_alpha / self.rank


@dataclass(frozen=True)
class DistillationConfig(Section, section="training.distillation"):
    """A teacher, whose predictions are learned beside the text: the loss is (1 - weight) times the cross-entropy, plus
    weight temperature^2 KL(teacher || student)."""

    #: a run or a pretrained model with the same tokens, which runs at its own depth; empty: none
    teacher: PathText = ""
    weight: Annotated[float, Between(0, 1)] = 0.5  #: of the teacher's predictions; 1: they alone are learned
    temperature: PositiveFloat = 1.0  #: logits of both are divided by it; above 1, unlikely tokens count more
    teacher_dtype: TeacherDtype = "float32"  #: how the teacher's weights are stored


@dataclass(frozen=True)
class LocalCheckpointsConfig(Section, section="training.local_checkpoints"):
    """Checkpoints on each host's own disk or in its memory, beside those of the run directory (docs/multihost.md)."""

    #: a folder that each host has for itself, such as /dev/shm; may contain $VARIABLES; empty: none are saved
    folder: PathText = ""
    every: PositiveInt = 20  #: steps between them


@dataclass(frozen=True)
class TrainingConfig(Section, section="training"):
    """How a run trains. A step is an optimizer step on one global batch; learning rates are peaks of the schedule."""

    steps: PositiveInt = 1000  #: length of the run
    batch_size: PositiveInt = 16  #: rows of the global batch
    seed: Seed = 0  #: seed of the initial weights, of the order of the data, and of every other random draw
    #: a run or a pretrained model whose weights the run starts from; empty: weights drawn from the seed
    init_from: PathText = ""
    #: parts that the batch is split into, one after the other, to save memory; a divisor of batch_size
    grad_accumulation_steps: Annotated[PositiveInt, Formerly("accumulation")] = 1
    depth: DepthConfig = field(default_factory=DepthConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    # Optimizer and schedule.
    #: names of the parameters that stay as they are (docs/training.md): parts of the model, or components of a path
    frozen: tuple[str, ...] = ()
    optimizer: Optimizer = "adamw"  #: `muon`: Muon for the matrices inside the layers, AdamW for everything else
    optimizer_dtype: MomentsDtype = "float32"  #: how the optimizer's moments are stored (docs/training.md)
    #: after the warm-up: `cosine`, `constant`, or `wsd`: constant, then linear over the last `decay_fraction` of steps
    schedule: Schedule = "cosine"
    #: wsd: fraction of the steps over which the learning rate decays
    decay_fraction: Annotated[float, Between(0, 1, "(]", "a fraction"), Formerly("decay_share")] = 0.2
    learning_rate: PositiveFloat = 1e-3  #: peak learning rate of AdamW
    muon_learning_rate: PositiveFloat = 0.02  #: muon: peak learning rate of Muon, with the same schedule
    #: muon: a matrix with more outputs than inputs moves sqrt(outputs / inputs) times as far (Jordan's code)
    muon_shape_scaling: bool = False
    #: factors on the learning rate by the name of parameters, as in `frozen`; the last name of a parameter counts
    learning_rate_factors: dict[str, PositiveFloat] = field(default_factory=dict, hash=False)
    #: cosine, wsd: learning rate at the last step, as a fraction of the peak
    final_learning_rate_fraction: Annotated[
        float,
        Between(0, 1, noun="a fraction"),
        Formerly("final_learning_rate", "a fraction of the peak, e.g. 0.1"),
    ] = 0.1
    warmup_steps: NonNegativeInt = 50  #: steps over which the learning rate rises linearly to its peak
    weight_decay: NonNegativeFloat = 0.1  #: decoupled weight decay, of matrices only
    b1: Annotated[float, Between(0, 1, "[)")] = 0.9  #: AdamW: decay of the first moment
    b2: Annotated[float, Between(0, 1, "[)")] = 0.95  #: AdamW: decay of the second moment
    eps: PositiveFloat = 1e-8  #: AdamW: added to the denominator
    gradient_clip: NonNegativeFloat = 1.0  #: largest global norm of the gradients; 0: no clipping
    #: decay of a moving average of the weights, which evaluation then uses; 0: no average
    ema_decay: Annotated[float, Between(0, 1, "[)")] = 0.0
    #: step of the router bias towards equal expert load (DeepSeek-V3); 0: off
    balance_rate: NonNegativeFloat = 1e-3

    #: options of XLA's compiler for the train step: its own, or `tuned`, MaxText's for the kind of chip
    compiler: Compiler = "default"

    # Failures, checkpoints and logs.
    bad_steps: BadSteps = "stop"  #: on a NaN, infinity or loss spike: stop the run, or skip the update and count it
    max_bad_steps: PositiveInt = 10  #: `skip`: the run stops when this many updates in a row were skipped
    #: a loss above this multiple of its running mean is a spike
    spike_factor: Annotated[float, Gt(1), Or(0, "for none")] = 0.0
    checkpoint_every: PositiveInt = 500  #: steps between checkpoints
    #: minutes between checkpoints, beside those of `checkpoint_every`; 0: by steps alone
    checkpoint_minutes: NonNegativeFloat = 0.0
    local_checkpoints: LocalCheckpointsConfig = field(default_factory=LocalCheckpointsConfig)
    keep_checkpoints: PositiveInt = 2  #: number of newest checkpoints that are kept
    #: seconds after which a step, save or evaluation that does not end makes the process print the stacks of its
    #: threads and end with exit code 42; 0: never
    hang_timeout: NonNegativeFloat = 1800.0
    log_every: PositiveInt = 10  #: steps between lines of the log
    evaluate_every: NonNegativeInt = 0  #: steps between measurements of the held-out loss at model.loops; 0: never
    #: destinations of the log in addition to metrics.jsonl
    loggers: Annotated[tuple[Logger, ...], Formerly("writers")] = ()
    profile_steps: tuple[int, ...] = ()  #: [first, last]: steps to trace with the profiler, into the run directory

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.batch_size % self.grad_accumulation_steps == 0
        self.check(divides, "grad_accumulation_steps", f"a divisor of batch_size {self.batch_size}")
        span = self.profile_steps
        ordered = not span or (len(span) == 2 and 1 <= span[0] <= span[1])
        check_field(ordered, "training.profile_steps", span, "[first, last], or []")

    @property
    def decay_steps(self) -> int:
        """wsd: the number of last steps over which the learning rate decays."""
        return max(round(self.decay_fraction * self.steps), 1)

    @property
    def curriculum_length(self) -> int:
        """The number of first steps over which the mean depth rises; 0: it is constant."""
        return self.depth.curriculum_steps or math.ceil(self.depth.curriculum_fraction * self.steps - 1e-6)

    def schedule_problem(self) -> str:
        """Why the run is too short for its learning rate schedule, as an error says it; empty if it is not."""
        if self.warmup_steps > self.steps:
            return (
                f"training.warmup_steps: got {self.warmup_steps}, allowed: at most training.steps, {self.steps}, or "
                "the learning rate never reaches its peak"
            )
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            return (
                f"training.warmup_steps: got {self.warmup_steps}, allowed: at most {self.steps - self.decay_steps}, "
                f"which training.decay_fraction {self.decay_fraction} of {self.steps} steps leaves, or the learning "
                "rate never comes down to its end"
            )
        if self.depth.curriculum_steps > self.steps:
            return (
                f"training.depth.curriculum_steps: got {self.depth.curriculum_steps}, allowed: at most training.steps, "
                f"{self.steps}, or the depth never reaches its mean"
            )
        return ""
