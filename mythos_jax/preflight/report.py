"""What a preflight found: does it fit, what does a step cost, and what limits its speed; as text and as JSON."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mythos_jax.chips import GIB
from mythos_jax.config import Config
from mythos_jax.flops import forward_flops, training_flops
from mythos_jax.ops.chunked import count_chunks
from mythos_jax.preflight.collectives import Collective, read_collectives
from mythos_jax.preflight.compile import Buffer, Program, compile_decode, compile_train
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.topology import Topology
from mythos_jax.sharding import device_bytes
from mythos_jax.training.depth import loops_without_gradient


@dataclass(frozen=True)
class PreflightReport:
    """What `mythos compile` reports.

    step: train or decode. tokens: per step. hbm: bytes per chip by what they hold. needed: their peak, in bytes per
    chip. biggest: the largest buffers, if the compiler refused the program. advice: which setting to change, if it does
    not fit. flops: of one step on the whole mesh, `model` counted from the config and `compiled` from the program.
    uncounted: custom calls of unknown cost, which count as free. reported: kernels whose cost is what they say
    themselves. open_loops: loops that count as running once because their length is known only at run time. seconds:
    lower bounds of the time of a step, by resource. sum_seconds: lower bound if a chip runs one instruction after the
    other. If the compiler refused the program, flops, collectives and all that follows are empty.
    """

    name: str
    step: str
    topology: Topology
    mesh: dict[str, int]
    tokens: int
    hbm: dict[str, float]
    needed: float
    biggest: tuple[Buffer, ...]
    advice: str
    flops: dict[str, float]
    collectives: tuple[Collective, ...]
    uncounted: tuple[str, ...]
    reported: tuple[str, ...]
    open_loops: tuple[str, ...]
    seconds: dict[str, float]
    sum_seconds: float
    fits: bool

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def step_seconds(self) -> float:
        """The lower bound of the time of a step: instructions run one after the other, beside all communication."""
        return max(self.sum_seconds, *self.seconds.values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs in this time, relative to what the chips could do."""
        return self.flops["model"] / self.step_seconds / (self.chips * self.topology.chip.flops)

    @property
    def bound(self) -> str:
        """The resource that limits the speed."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for JSON; sizes in bytes, times in seconds."""
        return {
            "name": self.name,
            "step": self.step,
            "topology": self.topology.name,
            "chips": self.chips,
            "mesh": self.mesh,
            "fits": self.fits,
            "hbm": {**self.hbm, "peak": self.needed, "capacity": self.topology.chip.hbm_bytes},
            "biggest": [dataclasses.asdict(buffer) for buffer in self.biggest],
            "advice": self.advice,
            "tokens": self.tokens,
            "flops": self.flops,
            "uncounted": self.uncounted,
            "reported": self.reported,
            "open_loops": self.open_loops,
            "collectives": [
                {"kind": kind, "axes": axes, "count": count, "ici": ici, "dcn": dcn}
                for (kind, axes), (count, ici, dcn) in _by_kind(self.collectives).items()
            ],
            "seconds": self.seconds,
            "bound": self.bound if self.seconds else "",
            **(self._speed() if self.seconds else {}),
        }

    def _speed(self) -> dict[str, float]:
        return {
            "sum_seconds": self.sum_seconds,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens / self.step_seconds,
            "utilisation": self.utilisation,
        }

    def as_text(self) -> str:
        """The report for people."""
        capacity = self.topology.chip.hbm_bytes
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        lines = [
            f"{self.name}: {self.step} step on {self.topology.name} ({self.chips} chips), mesh {mesh}",
            "",
            f"HBM per chip, of {capacity / GIB:.2f} GiB",
            *(f"  {name:<12} {size / GIB:>9.2f} GiB" for name, size in self.hbm.items()),
        ]
        if self.seconds:
            lines.append(f"  {'peak':<12} {self.needed / GIB:>9.2f} GiB")
        lines += ["", "FITS" if self.fits else f"DOES NOT FIT: it needs {self.needed / GIB:.2f} GiB"]
        if self.biggest:
            lines += ["  largest buffers:"]
            lines += [f"  {b.bytes / GIB:>9.2f} GiB  {b.type}  {b.source}" for b in self.biggest[:6]]
        if self.advice:
            lines += [f"  to change: {self.advice}"]
        if self.seconds:
            lines += ["", *_cost_lines(self)]
        return "\n".join(lines)


def preflight(config: Config, topology: Topology, decode: bool = False, quick: bool = False) -> PreflightReport:
    """Compiles a step and reads the compiled program. quick: with less search for fast code by the compiler.

    Raises ConfigError for an impossible mesh, batch size or topology.
    """
    program = (compile_decode if decode else compile_train)(config, topology, quick)
    return make_report(config, topology, program, decode)


def make_report(config: Config, topology: Topology, program: Program, decode: bool = False) -> PreflightReport:
    """The report of a compiled program."""
    hbm = {name: float(device_bytes(tree)) for name, tree in program.state.items() if tree is not None}
    advice = _advice(config, program, hbm, topology, decode)
    report = PreflightReport(
        name=config.name,
        step="decode" if decode else "train",
        topology=topology,
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1} or {"data": 1},
        tokens=config.evaluation.batch_size if decode else config.training.batch_size * config.data.seq_len,
        hbm=hbm,
        needed=0.0,
        biggest=(),
        advice="",
        flops={},
        collectives=(),
        uncounted=(),
        reported=(),
        open_loops=(),
        sum_seconds=math.nan,
        seconds={},
        fits=False,
    )
    if program.refusal is not None:
        refusal = program.refusal
        return dataclasses.replace(report, needed=refusal.needed, biggest=refusal.biggest, advice=advice)
    peak = sum(hbm.values()) + program.temporaries + program.code
    fits = peak <= topology.chip.hbm_bytes
    # Every target counts, as in plain text.
    chunks = count_chunks(config.data.seq_len // program.mesh.shape["sequence"], config.model.vocab_size)
    module = parse(program.text, 1 if decode else loops_without_gradient(config), chunks)
    collectives = tuple(read_collectives(module, program.mesh))
    per_chip, chip = cost(module), topology.chip
    if decode:
        # A new token attends to half of the longest context on average.
        forward = forward_flops(config.model, config.data.seq_len // 2).at(config.model.loops)
        model_flops = float(report.tokens * forward)
    else:
        model_flops = float(training_flops(config, teacher=program.teacher))
    return dataclasses.replace(
        report,
        hbm=hbm | {"temporaries": float(program.temporaries), "code": float(program.code)},
        needed=peak,
        advice="" if fits else advice,
        flops={"model": model_flops, "compiled": float(per_chip.flops * program.mesh.size)},
        collectives=collectives,
        uncounted=per_chip.uncounted,
        reported=per_chip.reported,
        open_loops=tuple(sorted({loop.op_name for loop in module.open_loops()})),
        sum_seconds=per_chip.seconds(chip),
        seconds={
            "compute": float(per_chip.flops / chip.flops),
            "HBM": per_chip.hbm_bytes / chip.hbm_bandwidth,
            "ICI": sum(c.ici for c in collectives) / chip.ici_bandwidth,
            "DCN": sum(c.dcn for c in collectives) / chip.dcn_bandwidth,
        },
        fits=fits,
    )


def _advice(config: Config, program: Program, hbm: dict[str, float], topology: Topology, decode: bool) -> str:
    """Which setting to change first, if the program does not fit."""
    capacity, training = topology.chip.hbm_bytes, config.training
    if decode and hbm["cache"] > hbm["parameters"]:
        return f"the cache is too large: lower evaluation.batch_size ({config.evaluation.batch_size}) or data.seq_len"
    # Gradients take as much memory as the parameters.
    if sum(hbm.values()) + (0 if decode else hbm["parameters"]) > 0.8 * capacity:
        return "the state alone is too large: use more chips, or shard the weights further (mesh.fsdp, mesh.expert)"
    if decode:
        return "the temporaries are too large: lower evaluation.batch_size, or raise mesh.tensor"
    if config.model.remat != "full":
        return f"set model.remat to full (it is {config.model.remat})"
    batch_shards = program.mesh.size // (program.mesh.shape["tensor"] * program.mesh.shape["sequence"])
    parts = training.grad_accumulation_steps
    rows = training.batch_size // parts // batch_shards
    if rows > 1:
        return f"set training.grad_accumulation_steps to {parts * rows} (each chip processes {rows} rows at a time)"
    return "each chip already processes one row at a time: raise mesh.tensor or mesh.sequence, or use more chips"


def _by_kind(collectives: tuple[Collective, ...]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """From (kind, mesh axes) to (runs per step, bytes per chip over ICI, bytes per chip over DCN), largest first."""
    totals: dict[tuple[str, str], tuple[float, float, float]] = {}
    for c in collectives:
        if c.group > 1:
            key = (c.kind, " x ".join(c.axes))
            count, ici, dcn = totals.get(key, (0.0, 0.0, 0.0))
            totals[key] = (count + c.runs, ici + c.ici, dcn + c.dcn)
    return dict(sorted(totals.items(), key=lambda item: -item[1][1] - item[1][2]))


def _cost_lines(report: PreflightReport) -> list[str]:
    model, compiled, seconds = report.flops["model"], report.flops["compiled"], report.step_seconds
    bounds = ", ".join(f"{name} {value:.3g} s" for name, value in report.seconds.items())
    return [
        f"FLOPs per step ({report.tokens:,} tokens): {model:.3e} of the model, {compiled:.3e} compiled "
        f"({compiled / model:.2f} x)",
        *([f"Not counted: custom calls {', '.join(report.uncounted)}"] if report.uncounted else []),
        *([f"Counted as they report themselves: kernels {', '.join(report.reported)}"] if report.reported else []),
        *(f"Counted as running once: {loop}" for loop in report.open_loops),
        "",
        "Collectives per step, with the bytes that each chip sends",
        *(
            f"  {kind:<18} {axes:<22} {count:>7.0f} x {ici / 1e9:>10.3f} GB ICI {dcn / 1e9:>9.3f} GB DCN"
            for (kind, axes), (count, ici, dcn) in _by_kind(report.collectives).items()
        ),
        "",
        f"Roofline: {bounds}; bound by {report.bound}",
        f"Sum over instructions of the larger of compute and HBM: {report.sum_seconds:.3g} s",
        f"At best {seconds:.3g} s per step, {report.tokens / seconds:,.0f} tokens/s, {report.utilisation:.1%} of peak "
        "FLOPs for the model",
    ]
