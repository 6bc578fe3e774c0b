"""`mythos convert`: from one weight format to another, with a report of every tensor."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_jax.porting.adapted import open_pretrained
from mythos_jax.porting.check import Check, check_conversion, require_original
from mythos_jax.porting.coverage import Coverage, check_tensors
from mythos_jax.porting.families import get_family
from mythos_jax.porting.reading import ConfigLike, FileSource, Source
from mythos_jax.porting.saving import Written, write_directory
from mythos_jax.porting.writing import SHARD_BYTES, refuse_existing


@dataclass
class ConversionReport:
    """The result of a conversion. written: what the new directory contains; nothing if there were problems."""

    source: str
    source_format: str
    target: str
    target_format: str
    coverage: Coverage
    written: Written = field(default_factory=lambda: Written({}))
    check: Check | None = None

    @property
    def ok(self) -> bool:
        """Whether the model was written, and agrees with the original if that was checked."""
        return bool(self.written.tensors) and (self.check is None or self.check.ok)


def convert(
    src: str | Path | Source,
    dst: str | Path,
    to: str,
    config: ConfigLike | None = None,
    check: bool = False,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> ConversionReport:
    """Writes the model at `src` as a new directory `dst` in the format `to`; stored dtypes are kept.

    src: a path or Hugging Face id as for `load_pretrained`, or an open `Source` (`VariablesSource` for a model in
    memory). config: for a `src` that holds only tensors. check: also run the PyTorch original and our model on the
    same tokens, and compare. If tensors are missing, unexpected or of the wrong shape, the report lists them and
    nothing is written. Raises ConfigError as `load_pretrained` and `save_pretrained` do, and if `check` is impossible.
    """
    target_family = get_family(to)
    refuse_existing(dst)
    source = src if isinstance(src, Source) else open_pretrained(src, config, keep_dtype=True)
    if check:
        require_original(source.family.name, to)
    target_family.require_expressible(source.config)
    report = ConversionReport(str(source.path), source.family.name, str(dst), to, check_tensors(source))
    if report.coverage.problems:
        return report
    report.written = write_directory(dst, source, target_family, shard_bytes=shard_bytes, progress=progress)
    if check:
        report.check = check_conversion(source, FileSource(dst))
    return report


def format_report(report: ConversionReport, tensors: bool = True) -> str:
    """The report as text. tensors: list each tensor written."""
    coverage = report.coverage
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(coverage.dtypes.items()))
    lines = [
        f"{report.source} ({report.source_format}) -> {report.target} ({report.target_format})",
        f"source tensors: {coverage.used}, each used once ({dtypes})" if dtypes else "source tensors: none can be used",
    ]
    if coverage.wrappers:
        lines.append(f"taken off the tensors' names: {', '.join(coverage.wrappers)}")
    if coverage.tied:
        lines.append(f"tied, equal to a tensor that is used: {', '.join(coverage.tied)}")
    if coverage.buffers:
        lines.append(f"recomputed, not read: {', '.join(coverage.buffers)}")
    lines += coverage.lines()
    problems = coverage.problems
    if problems:
        return "\n".join([*lines, f"{len(problems)} problems:", *(f"  {p}" for p in problems), "nothing was written"])
    written = report.written
    if tensors:
        width = max(map(len, written.tensors))
        lines += [f"  {name:{width}} {dtype:9} {list(shape)}" for name, (shape, dtype) in written.tensors.items()]
    lines.append(f"target tensors: {len(written.tensors)}, all written")
    lines.append(f"parameters: {coverage.parameters:,}")
    for what, names in (("copied", written.copied), ("made", written.made), ("left in the source", written.left)):
        lines += [f"{what}: {', '.join(names)}"] if names else []
    lines += written.notes
    if report.check:
        lines += report.check.lines()
    return "\n".join(lines)


def report_as_json(report: ConversionReport) -> dict[str, Any]:
    """The report as plain containers, for `json.dumps`."""
    return {
        "source": report.source,
        "source_format": report.source_format,
        "target": report.target,
        "target_format": report.target_format,
        "ok": report.ok,
        "written": bool(report.written.tensors),
        "parameters": report.coverage.parameters,
        "copied": report.written.copied,
        "made": report.written.made,
        "left": report.written.left,
        "notes": report.written.notes,
        "coverage": {**dataclasses.asdict(report.coverage), "problems": report.coverage.problems},
        "tensors": {
            name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in report.written.tensors.items()
        },
        "check": dataclasses.asdict(report.check) | {"ok": report.check.ok} if report.check else None,
    }
