"""What a preflight found: does it fit, what does a step cost, and what limits its speed."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from mythos_jax.config import Config
from mythos_jax.flops import forward_flops, training_flops
from mythos_jax.ops.chunked import count_chunks
from mythos_jax.preflight.advice import advise
from mythos_jax.preflight.buffers import Buffer, peak_buffers
from mythos_jax.preflight.causes import Cause, find_causes
from mythos_jax.preflight.collectives import Collective, by_kind, read_collectives
from mythos_jax.preflight.compile import compile_decode, compile_train
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.hlo import Module, parse
from mythos_jax.preflight.program import Program
from mythos_jax.preflight.topology import Topology
from mythos_jax.sharding import device_bytes
from mythos_jax.training.depth import loops_without_gradient

_BUFFERS = 20  # of the largest, in JSON


@dataclass(frozen=True)
class PreflightReport:
    """What `mythos compile` reports.

    step: train or decode. tokens: per step. steps: of the run; 0 for decode. hbm: bytes per chip by what they hold.
    needed: their peak, in bytes per chip. biggest: the buffers at that peak, the largest first, if XLA tells. advice:
    why it does not fit, and which setting to change. flops: of one step on the whole mesh, `model` counted from the
    config, `compiled` from the program, and those of them whose factors have 8 bits. uncounted: custom calls of unknown
    cost, which count as free. reported: kernels whose cost is what they say themselves. open_loops: loops that count as
    running once because their length is known only at run time. seconds: lower bounds of the time of a step, by
    resource. sum_seconds: lower bound if a chip runs one instruction after the other. causes: where it goes. If the
    compiler gave up early, flops and all that follows are empty.
    """

    name: str
    step: str
    topology: Topology
    mesh: dict[str, int]
    tokens: int
    steps: int
    hbm: dict[str, float]
    needed: float
    biggest: tuple[Buffer, ...]
    advice: str
    fits: bool
    flops: dict[str, float] = field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()
    uncounted: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()
    open_loops: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    sum_seconds: float = math.nan
    causes: tuple[Cause, ...] = ()

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def chips(self) -> int:
        return self.devices // self.topology.chip.devices

    @property
    def step_seconds(self) -> float:
        """The lower bound of the time of a step: instructions run one after the other, beside all communication."""
        return max(self.sum_seconds, *self.seconds.values())

    @property
    def days(self) -> float:
        """At least, of all steps of a run."""
        return self.steps * self.step_seconds / 86400

    @property
    def chip_hours(self) -> float:
        return self.days * 24 * self.chips

    @property
    def utilisation(self) -> float:
        """Model FLOPs in this time, relative to what the devices could do."""
        return self.flops["model"] / self.step_seconds / (self.devices * self.topology.chip.flops)

    @property
    def bound(self) -> str:
        """The resource that limits the speed."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def as_dict(self, top: int = 0, price: float = 0) -> dict[str, Any]:
        """Plain containers for JSON; sizes in bytes, times in seconds. top: how many causes. price: per chip-hour."""
        inside, between = (name.lower() for name in self.topology.chip.links)
        return {
            "name": self.name,
            "step": self.step,
            "topology": self.topology.name,
            "chips": self.chips,
            "devices": self.devices,
            "mesh": self.mesh,
            "fits": self.fits,
            "hbm": {**self.hbm, "peak": self.needed, "capacity": self.topology.chip.hbm_bytes},
            "biggest": [dataclasses.asdict(buffer) for buffer in self.biggest[:_BUFFERS]],
            "advice": self.advice,
            "tokens": self.tokens,
            "flops": self.flops,
            "uncounted": self.uncounted,
            "reported": self.reported,
            "open_loops": self.open_loops,
            "collectives": [
                {"kind": kind, "axes": axes, "count": count, inside: ici, between: dcn}
                for (kind, axes), (count, ici, dcn) in by_kind(self.collectives).items()
            ],
            "seconds": self.seconds,
            **(self._speed(top, price) if self.seconds else {"bound": ""}),
        }

    def _speed(self, top: int, price: float) -> dict[str, Any]:
        speed: dict[str, Any] = {
            "bound": self.bound,
            "sum_seconds": self.sum_seconds,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens / self.step_seconds,
            "utilisation": self.utilisation,
        }
        if self.steps:
            speed["run"] = {"steps": self.steps, "days": self.days, "chip_hours": self.chip_hours}
            if price:
                speed["run"]["price"] = price * self.chip_hours
        if top:
            speed["causes"] = [dataclasses.asdict(cause) for cause in self.causes[:top]]
        return speed


def preflight(config: Config, topology: Topology, decode: bool = False, quick: bool = False) -> PreflightReport:
    """Compiles a step and reads the compiled program. quick: with less search for fast code by the compiler.

    Raises ConfigError for an impossible mesh, batch size or topology.
    """
    program = (compile_decode if decode else compile_train)(config, topology, quick)
    return make_report(config, topology, program, decode)


def make_report(config: Config, topology: Topology, program: Program, decode: bool = False) -> PreflightReport:
    """The report of a compiled program."""
    state = {name: float(device_bytes(tree)) for name, tree in program.state.items() if tree is not None}
    # Every target counts, as in plain text.
    chunks = count_chunks(config.data.seq_len // program.mesh.shape["sequence"], config.model.vocab_size)
    module = parse(program.text, 1 if decode else loops_without_gradient(config), chunks)
    biggest = peak_buffers(module, program.live_ranges, program.assignment)
    refused = program.needed != 0
    # A refusal may not say how much; the buffers at the peak do.
    needed = sum(b.bytes for b in biggest) if math.isnan(program.needed) else program.needed
    temporaries = needed - sum(state.values()) if refused else float(program.temporaries + program.code)
    peak = sum(state.values()) + temporaries
    fits = not refused and peak <= topology.chip.hbm_bytes
    report = PreflightReport(
        name=config.name,
        step="decode" if decode else "train",
        topology=topology,
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1} or {"data": 1},
        tokens=config.evaluation.batch_size if decode else config.training.batch_size * config.data.seq_len,
        steps=0 if decode else config.training.steps,
        hbm=state | {"temporaries": temporaries - program.code, "code": float(program.code)},
        needed=peak,
        biggest=tuple(biggest),
        advice="" if fits else advise(config, program, state, biggest, topology, decode),
        fits=fits,
    )
    return _with_cost(report, config, program, module) if program.text else report


def _with_cost(report: PreflightReport, config: Config, program: Program, module: Module) -> PreflightReport:
    collectives = tuple(read_collectives(module, program.mesh))
    per_chip, chip = cost(module), report.topology.chip
    inside, between = chip.links
    if report.step == "decode":
        # A new token attends to half of the longest context on average.
        forward = forward_flops(config.model, config.data.seq_len // 2).at(config.model.loops)
        model_flops = float(report.tokens * forward)
    else:
        model_flops = float(training_flops(config, teacher=program.teacher))
    return dataclasses.replace(
        report,
        flops={
            "model": model_flops,
            "compiled": float(per_chip.flops * program.mesh.size),
            "in_8_bits": float(per_chip.narrow_flops * program.mesh.size),
        },
        collectives=collectives,
        uncounted=per_chip.uncounted,
        reported=per_chip.reported,
        open_loops=tuple(sorted({loop.op_name for loop in module.open_loops()})),
        sum_seconds=per_chip.seconds(chip),
        causes=tuple(find_causes(module, per_chip, chip)),
        seconds={
            "compute": per_chip.compute_seconds(chip),
            "HBM": per_chip.hbm_bytes / chip.hbm_bandwidth,
            inside: sum(c.ici for c in collectives) / chip.ici_bandwidth,
            between: sum(c.dcn for c in collectives) / chip.dcn_bandwidth,
        },
    )
