"""Loading a trained model: the run directory of `mythos train`, or a pretrained directory, file or hub id."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load

from mythos_jax.config import Config, DataConfig, MeshConfig, ModelConfig, load_run_config
from mythos_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.json_text import parse_json
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.predictor import PREDICTOR
from mythos_jax.paths import to_path
from mythos_jax.porting.pretrained import load_variables
from mythos_jax.porting.reading import FileSource, Source, VariablesSource
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.sharding import make_mesh, shardings


@dataclass(frozen=True)
class LoadedModel:
    """A trained model: `variables` placed on `mesh`, and what is known about their origin.

    directory: the run directory, or the pretrained model's.
    config: the run's; for a pretrained model only its `model` is meaningful.
    step: of the checkpoint; None for a pretrained model.
    tokenizer_spec: as for `load_tokenizer`; None if there is no tokenizer.
    """

    directory: Path
    config: Config
    model: Mythos
    variables: dict[str, Any]
    step: int | None
    mesh: Mesh
    tokenizer_spec: str | None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Raises ConfigError if its file cannot be read."""
        if self.tokenizer_spec is None:
            return None
        end = None if self.tokenizer_spec == ByteTokenizer.name else self.config.data.end_of_document
        return load_tokenizer(self.tokenizer_spec, end)

    def require_tokenizer(self) -> Tokenizer:
        """Raises ConfigError if there is none."""
        if self.tokenizer is None:
            allowed = "a tokenizer of your own (--tokenizer FILE or bytes)"
            raise ConfigError(f"{self.directory}: has no {TOKENIZER_FILE}; allowed: {allowed}")
        return self.tokenizer


def is_run(path: str | Path) -> bool:
    """Whether this is the directory of a training run."""
    return (to_path(path) / "config.yaml").is_file()


def load_model(
    path: str | Path,
    step: int | None = None,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    mesh: MeshConfig | None = None,
) -> LoadedModel:
    """A run at its newest checkpoint (or that of `step`), or a pretrained model (see `load_pretrained`).

    config: for a pretrained file that holds only tensors.
    tokenizer: a `tokenizer.json` or "bytes", instead of the model's own.
    mesh: device mesh, instead of the run's own or, for a pretrained model, the default one.

    Raises ConfigError: neither a run nor a model, no such checkpoint, files that are damaged or do not fit.
    """
    if is_run(path):
        return _load_run(to_path(path), step, tokenizer, mesh)
    if Path(path).is_dir() and (Path(path) / "checkpoints").is_dir():
        raise ConfigError(f"{path}: not a run directory (no config.yaml); allowed: what `mythos train` wrote")
    if step is not None:
        raise ConfigError(f"{path}: a pretrained model has no step {step}; allowed only with a run directory")
    source = FileSource(str(path), config)
    model_config, variables = load_variables(source, host=True)
    device_mesh = make_mesh(mesh or Config().mesh)
    return LoadedModel(
        directory=source.path if source.path.is_dir() else source.path.parent,
        config=Config(name=source.path.stem, model=model_config, data=DataConfig(seq_len=1)),
        model=Mythos(model_config),
        variables=place_variables(model_config, device_mesh, variables),
        step=None,
        mesh=device_mesh,
        tokenizer_spec=_spec(tokenizer or source.tokenizer),
    )


def place_variables(model_config: ModelConfig, mesh: Mesh, variables: dict[str, Any]) -> dict[str, Any]:
    """Puts arrays on the mesh by their logical axes; `balance` is {} if the model has no router."""
    targets = shardings(mesh, abstract_variables(model_config))
    needed = {name: variables[name] for name in targets}

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        # `device_put` of a host array would first check that all processes hold the same values.
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return {"balance": {}, **jax.tree.map(put, needed, targets)}


def open_source(path: str | Path, config: str | Path | None = None) -> Source:
    """A run or a pretrained model as a source of tensors, for `convert`."""
    if not is_run(path):
        return FileSource(str(path), config)
    run = _load_run(to_path(path))
    spec = run.tokenizer_spec
    file = Path(spec) if spec and Path(spec).is_file() else None
    return VariablesSource(run.config.model, run.variables, path, file)


def _load_run(
    directory: Path, step: int | None = None, tokenizer: str | Path | None = None, mesh: MeshConfig | None = None
) -> LoadedModel:
    config = load_run_config(directory / "config.yaml")
    device_mesh = make_mesh(mesh or config.mesh)
    checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if not steps or step not in (None, *steps):
        allowed = ", ".join(map(str, steps)) or "none was saved yet"
        raise ConfigError(f"{directory}: no checkpoint of step {step or 'any'}; allowed: {allowed}")
    step = step or steps[-1]
    boxed = abstract_variables(config.model)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings(device_mesh, boxed),
    )
    variables = checkpoints.restore_variables(step, {"balance": {}, **like})
    checkpoints.close()
    variables |= _load_predictor(directory, step)
    spec = _spec(tokenizer or _tokenizer_of(config))
    return LoadedModel(directory, config, Mythos(config.model), variables, step, device_mesh, spec)


def _tokenizer_of(config: Config) -> str | Path | None:
    """The tokenizer that a run's data was prepared with; None for a task, whose tokens are not text."""
    if config.data.task.name:
        return None
    prepared = to_path(config.data_path) / TOKENIZER_FILE
    return prepared if prepared.is_file() else config.data.tokenizer


def _spec(tokenizer: str | Path | None) -> str | None:
    return None if tokenizer is None else str(tokenizer)


def _load_predictor(directory: Path, step: int) -> dict[str, Any]:
    """The collection that `mythos train-predictor` saved for the weights of this step; empty if it did not.

    Raises ConfigError if there is a predictor that cannot be read.
    """
    folder = directory / PREDICTOR
    if not (folder / "predictor.json").is_file():
        return {}
    try:
        if parse_json((folder / "predictor.json").read_bytes())["step"] != step:
            return {}  # trained for other weights
        return {PREDICTOR: load((folder / "predictor.safetensors").read_bytes())}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: damaged ({one_line(error)}); `mythos train-predictor` recreates it") from None
