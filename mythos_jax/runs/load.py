"""Opening a trained model: the run directory of `mythos train`, or a pretrained directory, file or hub id."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load

from mythos_jax.config import Config, DataConfig, ModelConfig, load_run_config
from mythos_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError
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
    """A trained model: `variables` placed on `mesh`, and what is known of where they come from.

    config: of the run; for a pretrained model just its `model`. step: None for a pretrained model.
    directory: where reports go. tokenizer_spec: as for `load_tokenizer`, None where there is none.
    """

    directory: Path
    config: Config
    model: Mythos
    variables: dict[str, Any]
    step: int | None
    mesh: Mesh
    tokenizer_spec: str | None

    def tokenizer(self, given: str | None = None) -> Tokenizer:
        """The one given, else its own. Raises ConfigError when there is neither."""
        spec = given or self.tokenizer_spec
        if spec is None:
            raise ConfigError(f"{self.directory}: has no {TOKENIZER_FILE}; allowed: --tokenizer FILE, or bytes")
        return load_tokenizer(spec)


def is_run(path: str | Path) -> bool:
    """Whether this is the directory of a training run."""
    return (to_path(path) / "config.yaml").is_file()


def load_model(path: str | Path, step: int | None = None, config: str | None = None) -> LoadedModel:
    """A run at its newest checkpoint (or that of `step`), or a pretrained model (see `load_pretrained`).

    config: for a pretrained file that holds tensors only. Raises ConfigError: neither a run nor a model, no such
    checkpoint, files that are damaged or do not fit.
    """
    if is_run(path):
        return _open_run(to_path(path), step)
    if Path(path).is_dir() and (Path(path) / "checkpoints").is_dir():
        raise ConfigError(f"{path}: not a run directory (no config.yaml); allowed: what `mythos train` wrote")
    if step is not None:
        raise ConfigError(f"{path}: a pretrained model has no step {step}; allowed with a run directory only")
    source = FileSource(str(path), config)
    model_config, variables = load_variables(source, host=True)
    mesh = make_mesh(Config().mesh)
    return LoadedModel(
        directory=source.path if source.path.is_dir() else source.path.parent,
        config=Config(name=source.path.stem, model=model_config, data=DataConfig(seq_len=1)),
        model=Mythos(model_config),
        variables=place(model_config, mesh, variables),
        step=None,
        mesh=mesh,
        tokenizer_spec=None if source.tokenizer is None else str(source.tokenizer),
    )


def place(model_config: ModelConfig, mesh: Mesh, variables: dict[str, Any]) -> dict[str, Any]:
    """Arrays onto the mesh, each where its logical axes say; `balance` is {} where the model has no router."""
    where = shardings(mesh, abstract_variables(model_config))
    chosen = {name: variables[name] for name in where}

    def put(x: Any, at: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array):
            return jax.device_put(x, at)
        # Not `device_put`: of arrays on the hosts it would first compare all that the processes have.
        return jax.make_array_from_callback(x.shape, at, x.__getitem__)

    return {"balance": {}, **jax.tree.map(put, chosen, where)}


def open_source(path: str | Path, config: str | None = None) -> Source:
    """A run or a pretrained model as a source of tensors, for `convert`."""
    if not is_run(path):
        return FileSource(str(path), config)
    run = _open_run(to_path(path), None)
    spec = run.tokenizer_spec
    file = Path(spec) if spec and Path(spec).is_file() else None
    return VariablesSource(run.config.model, run.variables, path, file)


def _open_run(directory: Path, step: int | None) -> LoadedModel:
    config = load_run_config(directory / "config.yaml")
    mesh = make_mesh(config.mesh)
    checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if not steps or step not in (None, *steps):
        allowed = ", ".join(map(str, steps)) or "none was saved yet"
        raise ConfigError(f"{directory}: no checkpoint of step {step or 'any'}; allowed: {allowed}")
    step = step or steps[-1]
    boxed = abstract_variables(config.model)
    like = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), nn.unbox(boxed), shardings(mesh, boxed)
    )
    variables = checkpoints.restore_variables(step, {"balance": {}, **like})
    checkpoints.close()
    variables |= _predictor_of(directory, step)
    prepared = to_path(config.data_path) / TOKENIZER_FILE
    spec = str(prepared) if prepared.is_file() else config.data.tokenizer
    if config.data.task.name:
        spec = None  # its tokens are no text
    return LoadedModel(directory, config, Mythos(config.model), variables, step, mesh, spec)


def _predictor_of(directory: Path, step: int) -> dict[str, Any]:
    """Variables to add to those of a run at this step: what `mythos train-predictor` saved for them, if it did.

    Raises ConfigError where there is a predictor that cannot be read.
    """
    folder = directory / PREDICTOR
    if not (folder / "predictor.json").is_file():
        return {}
    try:
        if json.loads((folder / "predictor.json").read_text())["step"] != step:
            return {}  # of other weights
        return {PREDICTOR: load((folder / "predictor.safetensors").read_bytes())}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{folder}: damaged ({why}); `mythos train-predictor` recreates it") from None
