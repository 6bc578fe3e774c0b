"""Models that a run uses beside its own, the base of a LoRA run and a teacher: their weights are in no checkpoint, so a
run remembers which they were."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote, to_path
from mythos_jax.processes import log0
from mythos_jax.runs.configs import is_run


class MissingBaseError(ConfigError):
    """The base of a LoRA run cannot be loaded."""


# What a checkpoint stores about such a model; plain, so that it can be JSON.
ModelRecord = dict[str, Any]


def model_record(path: str, step: int | None, fingerprint: str) -> ModelRecord:
    """Where the weights came from, and a fingerprint of them. step: of the run that they are of; None for a pretrained
    model. `absolute` is for a start from another working directory."""
    local = not is_remote(path) and Path(path).exists()
    return {
        "path": path,
        "absolute": str(Path(path).absolute()) if local else path,
        "step": step,
        "fingerprint": fingerprint,
    }


def located(path: str, saved: Mapping[str, Any] | None, field: str) -> str:
    """Where a model is that a config names `path`: there, else where the directory was that the run began with."""
    absolute = path if saved is None or saved["path"] != path else saved.get("absolute", path)
    if absolute == path or Path(path).exists() or not Path(absolute).exists():
        return path
    log0(f"{field}: {path} is not here; using {absolute}, which is where it was")
    return str(absolute)


def step_of(path: str, saved: Mapping[str, Any] | None, directory: Any) -> int | None:
    """The step of the run at `path` whose weights the run in `directory` belongs to; None for a pretrained model, or if
    the run at `path` is another one now. Raises ConfigError if it is not there any more."""
    step = None if saved is None else saved.get("step")
    if step is None or not is_run(path):
        return None
    folder = to_path(path) / "checkpoints"
    if (folder / str(step)).is_dir():
        return int(step)
    if saved is not None and path not in (saved["path"], saved["absolute"]):
        return None  # the fingerprint tells
    steps = sorted(int(f.name) for f in folder.iterdir() if f.name.isdecimal()) if folder.is_dir() else []
    newest = f" (newest {steps[-1]})" if steps else ""
    raise ConfigError(f"{path}: step {step}, which {directory} belongs to, is not there any more{newest}")


@contextlib.contextmanager
def naming(field: str, flag: str = "") -> Iterator[None]:
    """Names the field, and the flag that sets it, where an error about a model says only where the model should be."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith(("training.", "data.")):
            raise
        raise ConfigError(f"{field}{flag and f' ({flag})'}: {error}") from None


def announce_step(record: ModelRecord | None) -> None:
    """Says on which checkpoint of another run a new run depends: the other run may delete it."""
    if record is not None and record["step"] is not None:
        log0(
            f"{record['path']}: this run needs its step {record['step']} as long as it is used; "
            "that run deletes it when it trains on for more than training.keep_checkpoints checkpoints"
        )


def check_base(saved: Mapping[str, Any], current: Mapping[str, Any], directory: Any, flag: str) -> None:
    """Raises ConfigError if the low-rank weights of a run belong to other weights than those that are here.

    saved, current: records of the base. flag: says where the weights are.
    """
    if saved["fingerprint"] != current["fingerprint"]:
        raise ConfigError(
            f"{directory}: its low-rank weights do not belong to the weights of {current['path']}; allowed: those of "
            f"{saved['path']} when the run began ({flag} MODEL says where they are now)"
        )


def check_teacher(saved: Mapping[str, Any] | None, current: Mapping[str, Any] | None, directory: Any) -> None:
    """Raises ConfigError if a run goes on with another teacher, with none, or with one that it did not have."""
    if saved is None and current is None:
        return
    if saved is None or current is None or saved["fingerprint"] != current["fingerprint"]:
        got = "" if current is None else current["path"]
        allowed = "none, as the run began" if saved is None else f"the weights of {saved['path']} as the run began"
        raise ConfigError(
            f"{directory}: cannot resume, training.distillation.teacher: got {got!r}, allowed: {allowed}; or a new "
            "--workdir"
        )
