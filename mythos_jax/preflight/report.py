"""What a preflight found: does it fit, what does a step cost, what bounds its time; as text and as JSON."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mythos_jax.chips import GIB
from mythos_jax.config import Config
from mythos_jax.flops import forward_flops, training_flops
from mythos_jax.preflight.collectives import Collective, read_collectives
from mythos_jax.preflight.compile import Buffer, Program, chip_bytes, compile_decode, compile_train
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.topology import Topology
from mythos_jax.training.depth import loops_without_gradient


@dataclass(frozen=True)
class Report:
    """hbm: bytes on a chip by what they are. flops: of one step, of the whole mesh: `model` counted from the config,
    `compiled` from the program. seconds: lower bounds of a step, by what it would be bound. Empty where it does not
    fit; then `needed` (bytes) and `biggest` say why."""

    name: str
    step: str  # train or decode
    topology: Topology
    mesh: dict[str, int]
    tokens: int  # per step
    hbm: dict[str, float]
    needed: float
    biggest: tuple[Buffer, ...]
    advice: str
    flops: dict[str, float]
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]
    fits: bool

    @property
    def step_seconds(self) -> float:
        """As if everything overlapped perfectly."""
        return max(self.seconds.values())

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def preflight(config: Config, topology: Topology, decode: bool = False, quick: bool = False) -> Report:
    """Compiles and reads. quick: with less of the compiler's search for fast code.

    Raises ConfigError for a mesh, batch or topology that cannot be.
    """
    return read(config, topology, (compile_decode if decode else compile_train)(config, topology, quick), decode)


def read(config: Config, topology: Topology, program: Program, decode: bool = False) -> Report:
    """What a compiled program says."""
    chips = program.mesh.size
    hbm = {name: float(chip_bytes(tree)) for name, tree in program.state.items() if tree is not None}
    tokens = config.evaluation.batch_size if decode else config.training.batch_size * config.data.seq_len
    common = dict(
        name=config.name,
        step="decode" if decode else "train",
        topology=topology,
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1} or {"data": 1},
        tokens=tokens,
    )
    if program.refusal is not None:
        return Report(
            **common,
            hbm=hbm,
            needed=program.refusal.needed,
            biggest=program.refusal.biggest,
            advice=advice(config, program, hbm, topology, decode),
            flops={},
            collectives=(),
            seconds={},
            fits=False,
        )
    peak = sum(hbm.values()) + program.temporaries + program.code
    fits = peak <= topology.chip.hbm_bytes
    module = parse(program.text, traced_depth=1 if decode else loops_without_gradient(config))
    collectives = tuple(read_collectives(module, program.mesh))
    found, chip = cost(module), topology.chip
    ideal = tokens * forward_flops(config.model, config.data.seq_len // 2).at(config.model.loops)
    return Report(
        **common,
        hbm=hbm | {"temporaries": float(program.temporaries), "code": float(program.code)},
        needed=peak,
        biggest=(),
        advice="" if fits else advice(config, program, hbm, topology, decode),
        flops={"model": float(ideal if decode else training_flops(config)), "compiled": float(found.flops * chips)},
        collectives=collectives,
        seconds={
            "compute": float(found.flops / chip.flops),
            "HBM": found.hbm_bytes / chip.hbm_bandwidth,
            "ICI": sum(c.ici for c in collectives) / chip.ici_bandwidth,
            "DCN": sum(c.dcn for c in collectives) / chip.dcn_bandwidth,
        },
        fits=fits,
    )


def advice(config: Config, program: Program, hbm: dict[str, float], topology: Topology, decode: bool) -> str:
    """The setting to change first."""
    capacity, t = topology.chip.hbm_bytes, config.training
    held = sum(hbm.values())
    if decode and hbm["cache"] > hbm["parameters"]:
        return f"the cache: lower evaluation.batch_size ({config.evaluation.batch_size}) or data.seq_len"
    # Gradients take as much again as the parameters.
    if held + (0 if decode else hbm["parameters"]) > 0.8 * capacity:
        return "the state alone is too large: take more chips, or a mesh that cuts the weights further (fsdp, expert)"
    if decode:
        return "temporaries: lower evaluation.batch_size, or raise mesh.tensor"
    if config.model.remat != "full":
        return f"set model.remat to full (it is {config.model.remat})"
    shards = program.mesh.size // (program.mesh.shape["tensor"] * program.mesh.shape["sequence"])
    rows = t.batch_size // t.grad_accumulation_steps // shards
    if rows > 1:
        steps = t.grad_accumulation_steps * rows
        return f"set training.grad_accumulation_steps to {steps} (each chip takes {rows} rows at a time)"
    return "a chip takes one row at a time already: raise mesh.tensor or mesh.sequence, or take more chips"


def as_json(report: Report) -> dict[str, Any]:
    """Plain containers, sizes in bytes, times in seconds."""
    return {
        "name": report.name,
        "step": report.step,
        "topology": report.topology.name,
        "chips": _chips(report),
        "mesh": report.mesh,
        "fits": report.fits,
        "hbm": {**report.hbm, "peak": report.needed, "capacity": report.topology.chip.hbm_bytes},
        "biggest": [dataclasses.asdict(buffer) for buffer in report.biggest],
        "advice": report.advice,
        "tokens": report.tokens,
        "flops": report.flops,
        "collectives": [
            {"kind": kind, "axes": axes, "count": count, "ici": ici, "dcn": dcn}
            for (kind, axes), (count, ici, dcn) in by_kind(report.collectives).items()
        ],
        "seconds": report.seconds,
        "bound": report.bound if report.seconds else "",
    }


def by_kind(collectives: tuple[Collective, ...]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(kind, mesh axes) to how many run in a step and the bytes a chip sends over ICI and over DCN."""
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    for c in collectives:
        if c.group > 1:
            key = (c.kind, " x ".join(c.axes))
            count, ici, dcn = found.get(key, (0.0, 0.0, 0.0))
            found[key] = (count + c.runs, ici + c.ici, dcn + c.dcn)
    return dict(sorted(found.items(), key=lambda item: -item[1][1] - item[1][2]))


def as_text(report: Report) -> str:
    """The same for people."""
    chip = report.topology.chip
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    lines = [
        f"{report.name}: {report.step} step on {report.topology.name} ({_chips(report)} chips), mesh {mesh}",
        "",
        f"HBM per chip, of {chip.hbm_bytes / GIB:.2f} GiB",
        *(f"  {name:<12} {size / GIB:>9.2f} GiB" for name, size in report.hbm.items()),
    ]
    if report.seconds:
        lines.append(f"  {'peak':<12} {report.needed / GIB:>9.2f} GiB")
    lines += ["", "FITS" if report.fits else "DOES NOT FIT"]
    if not report.fits:
        lines[-1] += f": it needs {report.needed / GIB:.2f} GiB"
        if report.biggest:
            lines += ["  biggest buffers:"]
            lines += [f"  {b.bytes / GIB:>9.2f} GiB  {b.type}  {b.source}" for b in report.biggest[:6]]
        lines += [f"  to change: {report.advice}"] if report.advice else []
    if report.seconds:
        lines += ["", *_costs(report)]
    return "\n".join(lines)


def _costs(report: Report) -> list[str]:
    model, compiled, seconds = report.flops["model"], report.flops["compiled"], report.step_seconds
    lines = [
        f"FLOPs per step ({report.tokens:,} tokens): {model:.3e} of the model, {compiled:.3e} compiled "
        f"({compiled / model:.2f} x)",
        "",
        "Collectives per step, bytes that each chip sends",
    ]
    lines += [
        f"  {kind:<18} {axes:<22} {count:>7.0f} x {ici / 1e9:>10.3f} GB ICI {dcn / 1e9:>9.3f} GB DCN"
        for (kind, axes), (count, ici, dcn) in by_kind(report.collectives).items()
    ]
    used = model / seconds / (_chips(report) * report.topology.chip.flops)
    each = ", ".join(f"{name} {value:.3g} s" for name, value in report.seconds.items())
    return [
        *lines,
        "",
        f"Roofline: {each}",
        f"At best {seconds:.3g} s a step, {report.tokens / seconds:,.0f} tokens/s, {used:.0%} of peak; "
        f"bound by {report.bound}",
    ]


def _chips(report: Report) -> int:
    size = 1
    for n in report.mesh.values():
        size *= n
    return size
