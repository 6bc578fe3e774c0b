"""Loading a trained model: the run directory of `mythos train`, or a pretrained directory, file or hub id."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import load

from mythos_jax.config import Config, DataConfig, MeshConfig, ModelConfig, load_run_config
from mythos_jax.config.files import config_from_words, sets_mesh
from mythos_jax.data.conventions import TextConventions, read_conventions
from mythos_jax.data.fetch import local_folder
from mythos_jax.data.manifest import MANIFEST_FILE, load_manifest
from mythos_jax.data.placement import fitting_batch
from mythos_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.json_text import parse_json
from mythos_jax.model.gather import LOW_RANK, SCALES
from mythos_jax.model.low_rank import merged
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.predictor import PREDICTOR
from mythos_jax.model.storage import FLOAT32, Storage, boxes_by_path
from mythos_jax.paths import to_path
from mythos_jax.porting import native
from mythos_jax.porting.adapted import open_pretrained
from mythos_jax.porting.hub import local_tokenizer
from mythos_jax.porting.pretrained import load_variables
from mythos_jax.porting.reading import Source, Text, VariablesSource
from mythos_jax.processes import log0
from mythos_jax.runs import source as start_files
from mythos_jax.runs.base import MissingBaseError, ModelRecord, check_base, located, model_record, step_of
from mythos_jax.runs.comparison import compared
from mythos_jax.runs.configs import is_run
from mythos_jax.runs.fingerprint import fingerprint
from mythos_jax.runs.low_rank import STORAGE, with_low_rank
from mythos_jax.runs.records import CONFIG_FILE
from mythos_jax.runs.restore import mesh_of, restore_run
from mythos_jax.runs.trained_on import TrainedOn
from mythos_jax.sharding import RULES, default_mesh, make_mesh, partition_spec


@dataclass(frozen=True)
class LoadedModel:
    """A trained model: `variables` placed on `mesh`, and what is known about their origin.

    directory: the run directory, or the pretrained model's.
    config: the run's; for a pretrained model only its `model`, `mesh` and `evaluation` are meaningful.
    step: of the checkpoint; None for a pretrained model.
    tokenizer_spec: as for `load_tokenizer`; None if there is no tokenizer.
    trained_on: what the checkpoint remembers of its data; nothing for a pretrained model.
    storage: how the weights are stored.
    family: the format that a pretrained model was published in; None for a run.
    text_directory: where the files are that say how a pretrained model reads and writes text (None: in `directory`);
    overlay: where those are that replace them; text: that itself, if no file says it.
    """

    directory: Path
    config: Config
    model: Mythos
    variables: dict[str, Any]
    step: int | None
    mesh: Mesh
    tokenizer_spec: str | None
    trained_on: TrainedOn = field(default_factory=TrainedOn)
    storage: Storage = FLOAT32
    family: str | None = None
    text_directory: Path | None = None
    overlay: Path | None = None
    text: Text | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Raises ConfigError if its file cannot be read, or if the model was trained with another one."""
        if self.tokenizer_spec is None:
            return None
        end = None if self.tokenizer_spec == ByteTokenizer.name else self.config.data.end_of_document
        tokenizer = load_tokenizer(self.tokenizer_spec, end)
        self.trained_on.check_tokenizer(tokenizer, f"tokenizer {self.tokenizer_spec}")
        _check_vocabulary(tokenizer, self.tokenizer_spec, self.config.model.vocab_size)
        return tokenizer

    @cached_property
    def conventions(self) -> TextConventions:
        """What a text starts and ends with: as a pretrained model's own files say, in a run as in its prepared data.

        Raises ConfigError if a file is damaged, or if there is no tokenizer.
        """
        tokenizer = self.require_tokenizer()
        if self.text is not None:
            return self.text[1]
        vocab_size = self.config.model.vocab_size
        if self.step is not None or self.tokenizer_spec is None:
            return start_files.conventions(self.directory, tokenizer, vocab_size)
        directory = self.text_directory or self.directory
        return read_conventions(self.tokenizer_spec, tokenizer, directory, vocab_size, self.family, self.overlay)

    def require_tokenizer(self) -> Tokenizer:
        """Raises ConfigError if there is none."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.step is None:
            allowed = "a tokenizer of your own (--tokenizer FILE or bytes)"
            raise ConfigError(f"{self.directory}: has no {TOKENIZER_FILE}; allowed: {allowed}")
        allowed = "the tokenizer that the run was trained with (--tokenizer FILE)"
        if self.trained_on.tokenizer is not None:
            raise ConfigError(f"{self.directory / TOKENIZER_FILE}: missing; allowed: {allowed}")
        raise ConfigError(
            f"{self.directory}: has no {TOKENIZER_FILE}, because an older version trained it, and its data is not at "
            f"{self.config.data_path} any more; allowed: {allowed}"
        )

    @property
    def data_config(self) -> Config:
        """The run's config with the run's own tokenizer, wherever the one that its data was prepared with is now."""
        if self.tokenizer_spec is None or not self.config.data.uses_tokenizer:
            return self.config
        return replace(self.config, data=replace(self.config.data, tokenizer=self.tokenizer_spec))

    def own_folders(self) -> list[Path]:
        """The prepared folders that the run was trained on, on the local disk. Raises ConfigError if one is missing."""
        names = list(self.config.data.mixture) or [self.config.data_path]
        for name in names:
            if not (to_path(name) / MANIFEST_FILE).is_file():
                raise ConfigError(
                    f"{self.directory}: its data is not here (there is no prepared folder {name}); allowed: to start "
                    "from the directory that has it; `mythos eval` takes other data with --data DIR"
                )
        return [local_folder(name, self.config.data.copy) for name in names]

    @property
    def evaluation_batch(self) -> int:
        """Rows per batch of an evaluation: `evaluation.batch_size`, rounded up to a multiple that the mesh divides."""
        return fitting_batch(self.mesh, self.config.evaluation.batch_size)


def load_model(
    path: str | Path,
    step: int | None = None,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    mesh: MeshConfig | Mesh | None = None,
    overrides: Sequence[str] = (),
    with_predictor: bool = True,
    storage: Storage = FLOAT32,
    keep_int8: bool = True,
    base: str | None = None,
    merge: bool = False,
) -> LoadedModel:
    """A run at its newest checkpoint (or that of `step`), or a pretrained model (see `load_pretrained`).

    config: for a pretrained file that holds only tensors.
    tokenizer: a `tokenizer.json` or "bytes", for a model that has none.
    mesh: device mesh. Default: the run's own if it fits the devices that are here, else the default one.
    overrides: command-line words that set fields of the config, such as `--mesh.tensor 2`.
    with_predictor: also load the run's depth predictor, if it has one.
    storage: how the weights are stored. keep_int8: those of a directory of int8 weights stay as they are.
    base: of a PEFT directory or a LoRA run, where the model is that its low-rank weights belong to (default: where they
      say).
    merge: add the low-rank weights of a LoRA run to its matrices; else they are a collection of their own.

    Raises ConfigError: neither a run nor a model, no such checkpoint, files that are damaged or do not fit.
    """
    tokenizer = None if tokenizer is None else local_tokenizer(str(tokenizer))
    if is_run(path):
        run = _load_run(to_path(path), step, tokenizer, mesh, overrides, with_predictor, base)
        return _stored_as(storage, run, merge)
    if Path(path).is_dir() and (Path(path) / "checkpoints").is_dir():
        raise ConfigError(f"{path}: not a run directory (no config.yaml); allowed: what `mythos train` wrote")
    if step is not None:
        raise ConfigError(f"{path}: a pretrained model has no step {step}; allowed only with a run directory")
    source = open_pretrained(str(path), config, base=base, open_base=open_source)
    run_config = config_from_words(overrides, name=source.path.stem)
    device_mesh = _as_mesh(mesh or (run_config.mesh if sets_mesh(overrides) else default_mesh()))
    if tokenizer is not None and source.tokenizer is not None:
        log0(f"tokenizer {tokenizer}: used in place of the model's own, {source.tokenizer}")
    if source.family is native.INT8_FAMILY and keep_int8:
        storage = replace(storage, int8=True)
    model_config, variables = load_variables(source, storage, placer(source.config, device_mesh))
    return LoadedModel(
        directory=source.path if source.path.is_dir() else source.path.parent,
        config=replace(run_config, model=model_config, data=DataConfig(seq_len=1)),
        model=Mythos(model_config),
        variables={"balance": {}, **variables},
        step=None,
        mesh=device_mesh,
        storage=storage,
        tokenizer_spec=_spec(tokenizer or source.tokenizer),
        family=source.origin.family if source.origin else source.family.name,
        text_directory=source.directory,
        overlay=source.overlay,
        text=source.text if tokenizer is None else None,
    )


def _stored_as(storage: Storage, run: LoadedModel, merge: bool) -> LoadedModel:
    """The run with its weights as `storage` says, where they are not int8 already."""
    variables = merged(run.variables) if merge and LOW_RANK in run.variables else run.variables
    if SCALES in variables:  # a base that the run has as int8, and is not rounded again
        if storage.dtype != FLOAT32.dtype:
            log0(f"{run.directory}: its base stays int8 beside float32, as the run has it; {storage.dtype} is not used")
        return replace(run, variables=variables, storage=replace(FLOAT32, int8=True))
    return replace(run, variables=storage.store_all(run.config.model, variables), storage=storage)


def placer(config: ModelConfig, mesh: Mesh) -> Callable[[str, Any], jax.Array]:
    """A function that puts the variable at a dotted path on the mesh, cut by its logical axes: each device gets its
    part of a host array, and nothing more."""
    boxes = boxes_by_path(config)

    def put(path: str, array: Any) -> jax.Array:
        collection, _, name = path.partition(".")
        box = boxes[f"params.{name}" if collection == SCALES else path]
        names = box.names if isinstance(box, nn.LogicallyPartitioned) else (None,) * array.ndim
        sharding = NamedSharding(mesh, partition_spec(array.shape, names, mesh.shape, RULES))
        return jax.device_put(array, sharding) if isinstance(array, jax.Array) else _from_host(array, sharding)

    return put


def _from_host(array: Any, sharding: NamedSharding) -> jax.Array:
    """A host array that every process has. `device_put` would first check that all of them hold the same values."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def open_source(
    path: str | Path,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: str | None = None,
) -> Source:
    """A run or a pretrained model as a source of tensors, for `convert`. overrides, base: as in `load_model`."""
    if not is_run(path):
        return open_pretrained(str(path), config, base=base, open_base=open_source, keep_dtype=True)
    run = _load_run(to_path(path), overrides=overrides, base=base)
    tokenizer = run.tokenizer  # which is checked by reading it
    if tokenizer is None and run.config.data.uses_tokenizer:
        log0(f"{path}: has no {TOKENIZER_FILE}, so the converted model gets none")
    has_file = tokenizer is not None and tokenizer.fingerprint != ByteTokenizer.fingerprint
    source = VariablesSource(run.config.model, run.variables, path, run.tokenizer_spec if has_file else None)
    if tokenizer is not None and source.tokenizer is not None:
        source.text = tokenizer, run.conventions
    start_files.add_to(source, run.directory)
    return source


def _load_run(
    directory: Path,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    mesh: MeshConfig | Mesh | None = None,
    overrides: Sequence[str] = (),
    with_predictor: bool = True,
    base: str | None = None,
) -> LoadedModel:
    config = load_run_config(directory / CONFIG_FILE, overrides)
    if base is not None:
        if not config.training.lora.rank:
            raise ConfigError(f"--base: got {base}, allowed only with a PEFT directory or a LoRA run, not {directory}")
        config = replace(config, training=replace(config.training, init_from=base))
    device_mesh = _as_mesh(mesh or config.mesh) if mesh or sets_mesh(overrides) else mesh_of(directory, config.mesh)
    variables, meta, step = restore_run(directory, config, device_mesh, step)
    if config.training.lora.rank:
        variables = _beside_base(config, device_mesh, meta, directory, variables[LOW_RANK])
    if with_predictor:
        whole = NamedSharding(device_mesh, PartitionSpec())
        variables |= jax.tree.map(lambda array: _from_host(array, whole), _load_predictor(directory, step))
    trained_on = TrainedOn.from_metadata(meta)
    spec = tokenizer or _tokenizer_of(directory, config, trained_on)
    return LoadedModel(directory, config, Mythos(config.model), variables, step, device_mesh, _spec(spec), trained_on)


def _beside_base(config: Config, mesh: Mesh, meta: Mapping[str, Any], directory: Path, low_rank: Any) -> dict[str, Any]:
    """The variables of a LoRA run's model. Raises ConfigError if its base is not there, or is another one."""
    path = config.training.init_from
    try:
        base, record, _ = load_base(config, mesh, meta["base"], directory)
    except MissingBaseError as error:
        raise MissingBaseError(
            f"{directory}: its base {path} is a LoRA run whose own base is missing ({error}); allowed: first to "
            f"convert {path} to a whole model (mythos convert {path} OUT --base MODEL), then --base OUT"
        ) from None
    except ConfigError as error:
        raise MissingBaseError(
            f"{directory}: the weights that its low-rank weights belong to cannot be loaded ({error}); allowed: to say "
            "where they are now, --base MODEL"
        ) from None
    check_base(meta["base"], record, directory, "--base")
    return with_low_rank(base.variables, low_rank, config.training.lora)


def load_base(
    config: Config, mesh: MeshConfig | Mesh, saved: Mapping[str, Any] | None, directory: Any
) -> tuple[LoadedModel, ModelRecord, dict[str, tuple[Any, Any]]]:
    """The model of `training.init_from`, whose weights a LoRA run leaves as they are; merged if it is of a LoRA run.
    Also the record of it, and the fields in which it differs from the run's model.

    saved: the record of it that the run in `directory` has, if that has begun.
    Raises ConfigError if there are no weights, or if they do not fit the run's model.
    """
    path = located(config.training.init_from, saved, "training.init_from")
    step = step_of(path, saved, directory)
    storage = STORAGE[config.training.lora.base_dtype]
    loaded = load_model(path, step, mesh=mesh, with_predictor=False, storage=storage, keep_int8=False, merge=True)
    changed = compared(loaded.config.model, config.model, path)
    return loaded, model_record(path, loaded.step, fingerprint(loaded.variables)), changed


def _as_mesh(mesh: MeshConfig | Mesh) -> Mesh:
    return mesh if isinstance(mesh, Mesh) else make_mesh(mesh)


def _tokenizer_of(directory: Path, config: Config, trained_on: TrainedOn) -> str | Path | None:
    """The tokenizer of a run: its own copy; for a run of 0.1.0, which has none, that of its data if it is still there.

    None for a task with tokens of its own, and if there is no such file.
    """
    if not config.data.uses_tokenizer:
        return None
    # Training refuses data with another tokenizer than the config's, so that the config is right about bytes.
    if trained_on.in_bytes or (trained_on.tokenizer is None and config.data.tokenizer == ByteTokenizer.name):
        return ByteTokenizer.name
    own = directory / TOKENIZER_FILE
    if own.is_file():
        return own
    try:
        folder = local_folder(config.data_path)
        manifest = load_manifest(folder)
    except ConfigError:
        return None
    if manifest.fingerprint not in trained_on.rows:
        return None
    log0(f"{own}: missing; using {folder / TOKENIZER_FILE}, which the run was trained with")
    return folder / TOKENIZER_FILE


def _check_vocabulary(tokenizer: Tokenizer, spec: str, vocab_size: int) -> None:
    """Raises ConfigError if the model lacks a token that a text may have; not for special ones, such as a padding that
    somebody added to the tokenizer only."""
    missing = [tokenizer.token_text(number) for number in range(vocab_size, tokenizer.vocab_size)]
    lacks = any(text is not None and tokenizer.special_token(text) is None for text in missing)
    if lacks or vocab_size <= tokenizer.end_of_document:
        allowed = f"at most {vocab_size}, the model's vocabulary"
        raise ConfigError(f"tokenizer {spec}: got {tokenizer.vocab_size} tokens, allowed: {allowed}")


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
        summary = parse_json((folder / "predictor.json").read_bytes())
        if summary["step"] != step:
            return {}  # trained for other weights
        weights = (folder / "predictor.safetensors").read_bytes()
        # Predictors written by 0.1.0 have no checksum.
        if hashlib.sha256(weights).hexdigest() != summary.get("sha256", hashlib.sha256(weights).hexdigest()):
            raise ValueError("the checksum of predictor.safetensors is not that in predictor.json")
        return {PREDICTOR: load(weights)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: damaged ({one_line(error)}); `mythos train-predictor` recreates it") from None
