"""The Apache Beam pipeline of `mythos data prepare --runner`: parts are tokenized, then shards written, then hashed.

Between the stages are the results of part_worker.py, as JSON. Beam is imported here alone, so this module is imported
when a pipeline is run, and on workers, where the package has to be installed.
"""

import argparse
import logging
from collections.abc import Iterable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import PipelineState

from mythos_jax.data.manifest import SPLITS
from mythos_jax.data.part_worker import Job, hash_split, part_to_json, plan_shards, tokenize_part, write_planned
from mythos_jax.data.text_parts import TextPart
from mythos_jax.errors import ConfigError, TrainingError, one_line
from mythos_jax.typed import nearest_name

DIRECT = "DirectRunner"


def check(runner: str, flags: Sequence[str]) -> None:
    """Raises ConfigError: no such runner, or a flag that Beam does not have, which it would ignore without a word."""
    _pipeline(runner, flags)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for group in PipelineOptions.__subclasses__():
        group._add_argparse_args(parser)
    known = [flag for action in parser._actions for flag in action.option_strings]
    for flag in flags:
        name = flag.partition("=")[0]
        if not flag.startswith("--") or name in known or runner not in (DIRECT, "DataflowRunner"):
            continue  # a job server of Flink or Spark has flags of its own
        near = nearest_name(name, known, cutoff=0.8)
        hint = f"did you mean {near}?" if near else "flags of mythos stand before --runner"
        raise ConfigError(f"--runner {runner}: Beam has no flag {name}; {hint}")


def run(parts: Sequence[TextPart], job: Job, runner: str, flags: Sequence[str], workers: int) -> None:
    """Runs the pipeline to its end. flags: Beam's own. workers: processes of the direct runner, unless flags say more.

    Raises TrainingError: the pipeline failed.
    """
    if runner == DIRECT and not any(flag.startswith("--direct_") for flag in flags):
        mode = "multi_processing" if workers > 1 else "in_memory"
        flags = [*flags, f"--direct_num_workers={workers}", f"--direct_running_mode={mode}"]
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    pipeline = _pipeline(runner, flags)
    build(pipeline, parts, job)
    try:
        result = pipeline.run()
        state = result.wait_until_finish() or result.state
    except (ConfigError, TrainingError):
        raise
    except Exception as error:  # of a worker, or of what the runner asks: no permission, no connection
        problem = f"the pipeline failed ({_reason(error)})"
        raise TrainingError(f"{runner}: {problem}; the same command goes on from there") from error
    if state != PipelineState.DONE:
        raise TrainingError(f"{runner}: the pipeline ended as {state}; the same command goes on from there")


def _reason(error: Exception) -> str:
    """The error in one line. That of a worker in another process is text, with the calls that led to it before it."""
    lines = str(error).splitlines()
    calls = [number for number, line in enumerate(lines) if line.startswith(" ")]
    text = "\n".join(lines[calls[-1] + 1 :] if calls else lines)
    return one_line(text, limit=300) or type(error).__name__


def _pipeline(runner: str, flags: Sequence[str]) -> beam.Pipeline:
    try:
        # Beam's own choice for DirectRunner would first try to download another runner, Prism.
        chosen = FnApiRunner() if runner == DIRECT else runner
        return beam.Pipeline(runner=chosen, options=PipelineOptions(list(flags)))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--runner: got {runner} ({one_line(error, limit=200)}); allowed: a runner of Beam") from None


def build(pipeline: beam.Pipeline, parts: Sequence[TextPart], job: Job) -> None:
    """Adds the stages to a pipeline."""
    results = (
        pipeline
        | "parts" >> beam.Create([part_to_json(part) for part in parts], reshuffle=False)
        | "spread parts" >> beam.Reshuffle()
        | "tokenize" >> beam.Map(tokenize_part, job)
    )
    shards = (
        pipeline
        | "once" >> beam.Create([""], reshuffle=False)
        | "plan" >> beam.FlatMap(_plan, beam.pvalue.AsIter(results), job)
        | "spread shards" >> beam.Reshuffle()
        | "write" >> beam.Map(write_planned, job)
    )
    _ = (
        pipeline
        | "splits" >> beam.Create(list(SPLITS), reshuffle=False)
        | "spread splits" >> beam.Reshuffle()
        | "hash" >> beam.Map(hash_split, beam.pvalue.AsIter(shards), job)
    )


def _plan(_: str, results: Iterable[str], job: Job) -> list[str]:
    return plan_shards(results, job)
