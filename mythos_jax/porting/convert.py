"""`mythos convert`: from one weight format to another, with a report of every tensor."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_jax.porting.check import Check, check_conversion, require_original
from mythos_jax.porting.coverage import Coverage, check_tensors
from mythos_jax.porting.families import get_family
from mythos_jax.porting.reading import ConfigLike, FileSource, Source
from mythos_jax.porting.writing import SHARD_BYTES, WrittenTensors, new_directory, refuse_existing, write_model


@dataclass
class ConversionReport:
    """The result of a conversion. tensors: shape and dtype of each tensor written; empty if nothing was written."""

    source: str
    source_format: str
    target: str
    target_format: str
    coverage: Coverage
    tensors: WrittenTensors = field(default_factory=dict)
    tokenizer: bool = False
    check: Check | None = None

    @property
    def ok(self) -> bool:
        """Whether the model was written, and agrees with the original if that was checked."""
        return bool(self.tensors) and (self.check is None or self.check.ok)


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
    source = src if isinstance(src, Source) else FileSource(src, config)
    if check:
        require_original(source.family.name, to)
    config_json = target_family.config_json(source.config)
    report = ConversionReport(str(source.path), source.family.name, str(dst), to, check_tensors(source))
    if report.coverage.problems:
        return report
    with new_directory(dst) as directory:
        report.tensors = write_model(
            directory,
            config_json,
            target_family.table(source.config),
            source.parameter,
            source.parameter_dtype,
            tokenizer=source.tokenizer,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    report.tokenizer = source.tokenizer is not None
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
    if tensors:
        width = max(map(len, report.tensors))
        lines += [f"  {name:{width}} {dtype:9} {list(shape)}" for name, (shape, dtype) in report.tensors.items()]
    lines.append(f"target tensors: {len(report.tensors)}, all written")
    lines.append(f"parameters: {coverage.parameters:,}")
    if report.tokenizer:
        lines.append("tokenizer.json: copied")
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
        "written": bool(report.tensors),
        "parameters": report.coverage.parameters,
        "tokenizer": report.tokenizer,
        "coverage": {**dataclasses.asdict(report.coverage), "problems": report.coverage.problems},
        "tensors": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in report.tensors.items()},
        "check": dataclasses.asdict(report.check) | {"ok": report.check.ok} if report.check else None,
    }
