"""A preflight's report for people."""

from mythos_jax.chips import GIB
from mythos_jax.preflight.buffers import held
from mythos_jax.preflight.causes import Cause
from mythos_jax.preflight.collectives import by_kind
from mythos_jax.preflight.report import PreflightReport


def report_text(report: PreflightReport, top: int = 0, price: float = 0) -> str:
    """All of it. top: how many causes. price: of a chip for an hour."""
    device = "device" if report.topology.chip.devices > 1 else "chip"
    capacity = report.topology.chip.hbm_bytes
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    lines = [
        f"{report.name}: {report.step} step on {report.topology.name} ({_chips(report)}), mesh {mesh}",
        "",
        f"HBM per {device}, of {capacity / GIB:.2f} GiB",
        *(f"  {name:<12} {size / GIB:>9.2f} GiB" for name, size in report.hbm.items()),
    ]
    lines += [
        f"  {'peak':<12} {report.needed / GIB:>9.2f} GiB",
        "",
        "FITS" if report.fits else f"DOES NOT FIT: it needs {report.needed / GIB:.2f} GiB",
    ]
    if report.advice:
        lines.append(f"  {report.advice}")
    if report.biggest and (top or not report.fits):
        lines += ["", *_buffers(report, top or 8)]
    if report.seconds:
        lines += ["", *_cost(report), "", *_speed(report), *_run(report, price)]
        if top:
            lines += ["", *_causes(report, top)]
    return "\n".join(lines)


def _chips(report: PreflightReport) -> str:
    chips = f"{report.chips} {'GPU' if report.topology.chip.is_gpu else 'chip'}{'s' * (report.chips > 1)}"
    return chips if report.devices == report.chips else f"{chips}, {report.devices} devices"


def _buffers(report: PreflightReport, rows: int) -> list[str]:
    totals = ", ".join(
        f"{name} {size / GIB:.2f} GiB" for name, size in held(report.biggest).items() if size > GIB / 200
    )
    return [
        f"The largest buffers at the peak ({totals})",
        *(
            f"  {b.bytes / GIB:>9.2f} GiB  {b.count} x {b.type}, {b.holds} {b.part} {b.source}".rstrip()
            for b in report.biggest[:rows]
        ),
    ]


def _cost(report: PreflightReport) -> list[str]:
    model, compiled, narrow = (report.flops[name] for name in ("model", "compiled", "in_8_bits"))
    inside, between = report.topology.chip.links
    return [
        f"FLOPs per step ({report.tokens:,} tokens): {model:.3e} of the model, {compiled:.3e} compiled "
        f"({compiled / model:.2f} x)" + (f", {narrow / compiled:.0%} of them in 8 bits" if narrow else ""),
        *([f"Not counted: custom calls {', '.join(report.uncounted)}"] if report.uncounted else []),
        *([f"Counted as they report themselves: kernels {', '.join(report.reported)}"] if report.reported else []),
        *(f"Counted as running once: {loop}" for loop in report.open_loops),
        "",
        "Collectives per step, with the bytes that each chip sends",
        *(
            f"  {kind:<18} {axes:<22} {count:>7.0f} x {ici / 1e9:>10.3f} GB {inside} {dcn / 1e9:>9.3f} GB {between}"
            for (kind, axes), (count, ici, dcn) in by_kind(report.collectives).items()
        ),
    ]


def _speed(report: PreflightReport) -> list[str]:
    bounds = ", ".join(f"{name} {value:.3g} s" for name, value in report.seconds.items())
    seconds = report.step_seconds
    return [
        f"Roofline: {bounds}; bound by {report.bound}",
        f"Sum over instructions of the larger of compute and HBM: {report.sum_seconds:.3g} s",
        f"At best {seconds:.3g} s per step, {report.tokens / seconds:,.0f} tokens/s, {report.utilisation:.1%} of peak "
        "FLOPs for the model",
    ]


def _run(report: PreflightReport, price: float) -> list[str]:
    if not report.steps:
        return []
    cost = f", {price * report.chip_hours:,.0f} at {price:g} per chip-hour" if price else ""
    time = f"at least {_duration(report.days)} at full depth, {report.chip_hours:,.0f} chip-hours"
    return [f"The run: {report.steps:,} steps take {time}{cost}"]


def _duration(days: float) -> str:
    return f"{days:.1f} days" if days >= 2 else f"{days * 24:.1f} hours"


def _causes(report: PreflightReport, top: int) -> list[str]:
    return [
        f"The {min(top, len(report.causes))} largest causes, of {len(report.causes)}",
        f"{'seconds':>8} {'compute':>8} {'HBM':>8} {'GB':>8}  {'n x runs':<11} what, part of the model, source",
        *(_cause(report, cause) for cause in report.causes[:top]),
    ]


def _cause(report: PreflightReport, cause: Cause) -> str:
    chip = report.topology.chip
    numbers = (cause.seconds, cause.compute_seconds, cause.hbm_bytes / chip.hbm_bandwidth)
    columns = " ".join(f"{number:>8.3f}" for number in numbers)
    origin = " ".join(text for text in (cause.phase, cause.part, cause.source) if text)
    beside = " (beside others)" if cause.in_background else ""
    times = f"{cause.count} x {cause.runs:.0f}"
    return f"{columns} {cause.hbm_bytes / 1e9:>8.1f}  {times:<11} {cause.what}{beside}, {origin}"
