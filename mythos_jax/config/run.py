"""`Config`: a whole run, and the training depths that follow from it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mythos_jax.bounds import Ge, Or, PositiveInt
from mythos_jax.config.data import DataConfig, EvaluationConfig
from mythos_jax.config.model import ModelConfig
from mythos_jax.config.training import TrainingConfig
from mythos_jax.typed import Section

AxisSize = Annotated[int, Ge(1), Or(-1, "for the rest")]


@dataclass(frozen=True)
class MeshConfig(Section, section="mesh"):
    """Number of devices along each mesh axis; one axis may be -1, for all devices that the others leave."""

    data: AxisSize = 1  #: shards the batch
    fsdp: AxisSize = -1  #: shards the batch, and weights and optimizer state along their model width
    tensor: AxisSize = 1  #: shards heads, hidden widths and the vocabulary
    expert: AxisSize = 1  #: shards the batch and the experts
    sequence: AxisSize = 1  #: shards positions
    slices: PositiveInt = 1  #: TPU slices that `data` spans; part of its size, not a further factor
    #: the loop's weights, if sharded by fsdp, are gathered once per step or in every loop (docs/sharding.md); `auto`:
    #: once, but per_loop if no row trains at more than one loop
    gather: Literal["auto", "once", "per_loop"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        rest = [axis for axis in ("data", "fsdp", "tensor", "expert", "sequence") if getattr(self, axis) == -1]
        if len(rest) > 1:
            self.check(False, rest[-1], "-1 on one axis only")


@dataclass(frozen=True)
class Config(Section):
    """A whole run."""

    name: str = "run"  #: name of the run and of its directory (default: the name of the config file)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.model.max_seq_len
        self.data.check(self.data.seq_len <= longest, "seq_len", f"at most model.max_seq_len, {longest}")
        self._check_gradients()
        self._check_exit_gate()
        self._check_lora()
        self._check_distillation()
        self.mesh.check(
            self.mesh.gather != "per_loop" or self.model.remat != "none" or max_loops(self) == 1,
            "gather",
            "auto or once with model.remat none (the backward pass would keep the gathered weights of every loop)",
        )

    def _check_gradients(self) -> None:
        """ACT weighs the outputs of all loops, so that all need gradients; without it, there are no weights that an
        objective could act on. Keys and values that are the first loop's get their gradient there alone."""
        depth, objectives, act = self.training.depth, self.training.objectives, self.model.readout == "act"
        first, needs_first = self.model.loop_kv == "first", "with model.loop_kv first, whose first loop needs gradients"
        truncated = depth.backprop_loops is not None and depth.backprop_loops < max_loops(self)
        allowed = "null with readout act, which needs the output of every loop"
        depth.check(not (act and truncated), "backprop_loops", allowed)
        depth.check(not (first and truncated), "backprop_loops", f"null {needs_first}")
        every_exit = act or objectives.exit_loss != "none"
        allowed = "false with readout act and with an exit_loss, which need the output of every loop"
        depth.check(not (every_exit and depth.backprop_up_to_mean), "backprop_up_to_mean", allowed)
        depth.check(not (first and depth.backprop_up_to_mean), "backprop_up_to_mean", f"false {needs_first}")
        for name in ["ponder_cost", "ponder_prior"]:
            objectives.check(act or not getattr(objectives, name), name, "0 unless model.readout is act")

    def _check_exit_gate(self) -> None:
        objectives = self.training.objectives
        objectives.check(
            self.model.exit_gate or objectives.exit_loss == "none", "exit_loss", "none without an exit_gate"
        )
        for name in ["contraction", "router_z"]:
            alone = objectives.exit_loss == "gain" and getattr(objectives, name)
            objectives.check(not alone, name, "0 with exit_loss gain, which trains the gate alone")

    def _check_lora(self) -> None:
        """Low-rank weights alone are trained, and the unit that says when to stop has none."""
        if not self.training.lora.rank:
            return
        because = "with training.lora.rank, where low-rank weights alone are trained"
        self.training.check(not self.training.frozen, "frozen", f"[] {because}")
        objectives = self.training.objectives
        objectives.check(objectives.exit_loss == "none", "exit_loss", f"none {because}, not the exit gate")
        for name in ["ponder_cost", "ponder_prior"]:
            objectives.check(not getattr(objectives, name), name, f"0 {because}, not the halting unit")

    def _check_distillation(self) -> None:
        if self.training.distillation.teacher:
            allowed = "none with a teacher (training.distillation), whose predictions the last loop learns"
            self.training.objectives.check(self.training.objectives.exit_loss == "none", "exit_loss", allowed)

    @property
    def data_path(self) -> str:
        """The folder of prepared rows. For a mixture, its first folder, whose tokenizer all folders share."""
        if self.data.mixture:
            return next(iter(self.data.mixture))
        return self.data.path or f"data/{self.name}"


def mean_loops(config: Config) -> int:
    """The mean number of loops per row that training draws; by default the model's depth, `model.loops`."""
    return config.training.depth.mean_loops or config.model.loops


def max_loops(config: Config) -> int:
    """The largest number of loops that training may draw for a row, and so the bound of a batch's cost.

    By default twice the mean; for the `fixed` distribution, the mean.
    """
    mean, depth = mean_loops(config), config.training.depth
    return depth.max_loops or (mean if depth.distribution == "fixed" else 2 * mean)


def backprop_loops(config: Config) -> int:
    """The number of last loops of a row that gradients flow through, a compile-time constant; by default all."""
    depth, most = config.training.depth, max_loops(config)
    if depth.backprop_up_to_mean:  # during a curriculum, `training.depth.loops_with_gradient` of each step
        most = min(most, mean_loops(config))
    return min(depth.backprop_loops or most, most)


def gathers_per_loop(config: Config) -> bool:
    """Whether training gathers the loop's weights in every loop: for one loop, once would hold all of them for longer
    than their layers need them."""
    gather = config.mesh.gather
    return max_loops(config) == 1 if gather == "auto" else gather == "per_loop"


def may_skip_loops(config: Config) -> bool:
    """Whether steps are expected in which no row runs all of the loops with gradients, so that it pays to look.

    Otherwise the mean of each step's draws is at least `backprop_loops`, and of many rows one runs them all.
    """
    depth = config.training.depth
    one_draw = depth.sample_per == "batch" and depth.distribution != "fixed"
    return bool(config.training.curriculum_length) or one_draw or backprop_loops(config) > mean_loops(config)


def has_static_depth(config: Config) -> bool:
    """Whether every row of every step runs the same number of loops, all with gradients.

    The number of loops can then be a constant of the compiled step instead of a traced value.
    """
    depth = config.training.depth
    constant = depth.distribution == "fixed" and not config.training.curriculum_length
    return constant and backprop_loops(config) == max_loops(config) == mean_loops(config)
