"""Configs of runs that start from a model: what they leave open about their model and its text is as in that one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mythos_jax import config as files
from mythos_jax.config import Config, DataConfig, ModelConfig, load_run_config
from mythos_jax.paths import to_path
from mythos_jax.runs.records import CONFIG_FILE
from mythos_jax.typed import to_dict

# Other rooms are imported where they are needed: most configs start from no model, and jax takes long to import.


FOLDER = "source"  # in the run directory: the files of the model that the run started from (source.py)


@dataclass(frozen=True)
class Start:
    """What a config takes from the model that its run starts from. tokenizer, end_of_document: as in `data`; None: it
    has no tokenizer, or its tokens are not those of one."""

    model: ModelConfig
    tokenizer: str | None = None
    end_of_document: str | None = None


def load_config(
    source: str | Path, overrides: Sequence[str] = (), run_dir: Callable[[str], Any] | None = None
) -> Config:
    """Reads a YAML config, as `mythos_jax.config.load_config` does. Fields of `model` that neither it nor the overrides
    give are those of the model that `training.init_from` names, and so is `data.tokenizer`; of a run that has begun,
    its own.

    run_dir: the run directory for the name of a run; None: the run is new.
    Raises ConfigError, also for a model that cannot be read.
    """

    def inherit(tree: dict[str, Any]) -> None:
        training = tree.get("training")
        init_from = training.get("init_from") if isinstance(training, dict) else None
        if not isinstance(init_from, str) or not init_from:
            return
        own = None if run_dir is None else run_dir(str(tree["name"]))
        goes_on = own is not None and is_run(own) and has_begun(own)
        start = start_of(own if goes_on else init_from)
        if _inherit(tree, start) and not goes_on and start.tokenizer != DataConfig().tokenizer:
            from mythos_jax.processes import log0

            log0(f"data.tokenizer is {start.tokenizer}, that of training.init_from, {init_from}")

    return files.load_config(source, overrides, inherit)


def start_of(path: Any) -> Start:
    """What a run takes from a run or from a pretrained model, whose weights are not read. Raises ConfigError."""
    if is_run(path):
        return _start_of_run(to_path(path))
    from mythos_jax.porting.adapted import of_base, tokenizer_of
    from mythos_jax.porting.hub import is_file_name
    from mythos_jax.porting.reading import read_model

    start = of_base(path, start_of)
    if start is None:
        model, tokenizer = read_model(path)
        start = Start(model)
    else:
        tokenizer = tokenizer_of(path)
    if tokenizer is None:
        return start
    return replace(start, tokenizer=str(tokenizer if is_file_name(path) else path), end_of_document=None)


def model_of(path: Any) -> ModelConfig:
    """The config of the model of a run, or of a pretrained model. Raises ConfigError."""
    return start_of(path).model


def is_run(path: str | Path) -> bool:
    """Whether this is the directory of a training run."""
    return (to_path(path) / CONFIG_FILE).is_file()


def has_begun(run_dir: Any) -> bool:
    """Whether a run has saved a checkpoint, from which it goes on."""
    from mythos_jax.runs.checkpoints import newest_folder

    return newest_folder(run_dir / "checkpoints") is not None


def _start_of_run(run_dir: Any) -> Start:
    from mythos_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer

    config = load_run_config(run_dir / CONFIG_FILE)
    data = config.data
    if not data.uses_tokenizer:
        return Start(config.model)
    if data.tokenizer == ByteTokenizer.name:
        return Start(config.model, ByteTokenizer.name)
    file = run_dir / TOKENIZER_FILE
    return (
        Start(config.model, str(_in_source(run_dir, file)), data.end_of_document)
        if file.is_file()
        else Start(config.model)
    )


def _in_source(run_dir: Any, file: Any) -> Any:
    """The tokenizer of a run, where the files are beside it that say how a conversation is written: for a run that was
    not trained on any, among those of the model that it started from, if that had the same tokenizer."""
    from mythos_jax.data.conventions import SETTINGS_FILE
    from mythos_jax.data.tokenizer import HuggingFaceTokenizer

    theirs = run_dir / FOLDER / file.name
    if (run_dir / SETTINGS_FILE).is_file() or not theirs.is_file():
        return file
    same = HuggingFaceTokenizer(theirs).fingerprint == HuggingFaceTokenizer(file).fingerprint
    return theirs if same else file


def _inherit(tree: dict[str, Any], start: Start) -> bool:
    """Adds to a config's tree what it leaves open; whether the tokenizer is among that. `from_dict` says what else may
    be wrong with it."""
    given, data = tree.get("model"), tree.get("data")
    if given is None or isinstance(given, dict):
        tree["model"] = {**to_dict(start.model), **(given or {})}
    if start.tokenizer is None or not (data is None or isinstance(data, dict)) or "tokenizer" in (data or {}):
        return False
    task = (data or {}).get("task")
    if isinstance(task, dict) and task.get("name") and task.get("tokens") != "tokenizer":
        return False
    text = {"tokenizer": start.tokenizer, "end_of_document": start.end_of_document}
    tree["data"] = {**text, **(data or {})}
    return True
