"""Sources of a model to convert or load: a directory, one file, a Hugging Face id, or variables in memory.

Tensors stay in their files until they are asked for, so that memory holds one at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from mythos_jax.config import ModelConfig, load_run_config, named_config
from mythos_jax.config.files import read_yaml
from mythos_jax.data.conventions import TextConventions, read_conventions
from mythos_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.model.gather import LOW_RANK, SCALES
from mythos_jax.model.low_rank import PARTS, merged
from mythos_jax.paths import is_lfs_pointer, read_json, to_path
from mythos_jax.porting import native
from mythos_jax.porting.dcp import DcpDirectory
from mythos_jax.porting.directories import files_of
from mythos_jax.porting.embedded import embedded_fields
from mythos_jax.porting.families import detect, has_signature, named_family
from mythos_jax.porting.family import Family, own_fields
from mythos_jax.porting.gguf_file import GgufFile
from mythos_jax.porting.hub import is_hub_id, resolve
from mythos_jax.porting.origin import Origin, json_fields, read_origin
from mythos_jax.porting.safetensors_files import SafetensorsFile
from mythos_jax.porting.tables import common_dtype
from mythos_jax.porting.tensor_info import TensorInfo
from mythos_jax.porting.torch_files import TorchFile
from mythos_jax.porting.wrappers import unwrap

# A ModelConfig, a reference's own fields, or the path of a `config.json` or of one of our YAML files.
ConfigLike = ModelConfig | Mapping[str, Any] | str | Path
TensorFile = SafetensorsFile | TorchFile | GgufFile | DcpDirectory
Text = tuple[Tokenizer, TextConventions]


class Source(ABC):
    """A model to read.

    path: names it in reports and errors. tensors: those it has, under its family's names. tokenizer: its
    `tokenizer.json` if any, or the GGUF file that it is in. table: the rows that `config` asks for, whether or not the
    tensors are there. wrappers: parts of the stored names that were taken off, such as `_orig_mod.`. notes: lines that
    say what was chosen among several, such as files. origin: what the files that the model was published in say beyond
    our config, if that is known. directory: where other files are that belong to the model, if there is such a place;
    weight_paths: those in it that hold its tensors. overlay: where a tokenizer and its settings are that replace those
    of `directory`. text: how it reads and writes text, if no file says that. checked: whether `require_tensors` has
    logged its notes.
    """

    wrappers: Sequence[str] = ()
    notes: Sequence[str] = ()
    origin: Origin | None = None
    directory: Path | None = None
    weight_paths: Sequence[Path] = ()
    overlay: Path | None = None
    text: Text | None = None
    checked: bool = False

    def __init__(
        self,
        path: Path,
        family: Family,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        tokenizer: Path | None,
    ):
        self.path, self.family, self.config = path, family, config
        self.tensors, self.tokenizer = tensors, tokenizer
        self.table = family.table(config)

    @abstractmethod
    def _read(self, stored_name: str) -> np.ndarray: ...

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype; a tied tensor under either of its names."""
        stored_name = self._stored_name(name)
        if stored_name is None:
            return np.zeros(self.table.their_shapes[name], np.float32)
        return self._read(stored_name)

    def parameter(self, path: str) -> np.ndarray:
        """Our parameter at `path`, in its stored dtype."""
        return self.table.read(path, self.read)

    def parameter_dtype(self, path: str) -> np.dtype:
        """The dtype of `parameter(path)`, without reading it."""
        names = [self._stored_name(name) for name in self.table.tensors_of(path)]
        return common_dtype(np.dtype(np.float32) if name is None else self.tensors[name].dtype for name in names)

    def _stored_name(self, name: str) -> str | None:
        """None for a tensor that is zeros because the file lacks it."""
        if name in self.tensors:
            return name
        if name in self.family.zeros:
            return None
        return next(alias for alias, tied_to in self.family.ties(self.config).items() if tied_to == name)


class FileSource(Source):
    """A model in a directory, in one file, or on the Hugging Face hub.

    config: required for a file that holds only tensors; elsewhere it replaces the config that comes with them.
    weights_key: which weights to read from a checkpoint of PyTorch that holds several, such as "ema".
    Raises ConfigError: nothing there, damaged, or no config.
    """

    def __init__(self, path: str | Path, config: ConfigLike | None = None, *, weights_key: str | None = None):
        path = resolve(path)
        notes: list[str] = []
        files = [open_tensors(file, weights_key) for file in files_of(path, notes)]
        file_of = {name: file for file in files for name in file.tensors}
        stored_names, self.wrappers, left = unwrap(file_of, has_signature, path)
        notes += [note for file in files for note in file.notes]
        if left:
            notes.append(f"{path}: read: the tensors under {self.wrappers[-1]}; left: those under {', '.join(left)}")
        self.notes = notes
        self._stored = {name: (file_of[stored], stored) for name, stored in stored_names.items()}
        infos = {name: file.tensors[stored] for name, (file, stored) in self._stored.items()}
        tensors = {name: TensorInfo(info.shape, info.dtype, info.kind) for name, info in infos.items()}
        fields, config_path = (None, path) if config is not None else _accompanying_fields(path, files, tensors)
        if isinstance(config, str | Path):
            config_path = Path(config)
            config = _read_config(config_path)
        if isinstance(config, Mapping):
            fields, config = config, None
        if config is None and fields is None:
            raise ConfigError(
                f"{path}: holds only tensors, from which the number of heads and the RoPE base cannot be determined; "
                "give its config (a config.json, or one of our YAML files)"
            )
        family = detect(fields if config is None else None, tensors, str(config_path))
        own = None if config else own_fields(fields or {})
        if config is None:
            config = family.model_config(fields or {}, str(config_path))
        # A GGUF file has its tokenizer in itself.
        tokenizer = path / "tokenizer.json"
        if files[0].path.suffix == ".gguf" and not tokenizer.is_file():
            tokenizer = files[0].path
        try:
            super().__init__(path, family, config, tensors, tokenizer if tokenizer.is_file() else None)
        except AssertionError:  # for a config that came with the tensors, it would be our own mistake
            if config_path == path:
                raise
            raise ConfigError(
                f"{config_path}: is not the config of {path}, whose tensors are those of a {family.name} model"
            ) from None
        self.directory = path if path.is_dir() and tokenizer.suffix != ".gguf" else None
        self.weight_paths = [file.path for file in files]
        if family in native.FAMILIES:
            self.origin = read_origin(path) if path.is_dir() else None
        elif own is not None:
            buffers = {name: partial(self.read, name) for name in family.stored_buffers(config) if name in tensors}
            self.origin = Origin(family.name, json_fields(own), buffers)

    def _read(self, stored_name: str) -> np.ndarray:
        file, name = self._stored[stored_name]
        return file.read(name)


class VariablesSource(Source):
    """A model in memory, in our own format; its low-rank weights are merged. `label` names it in reports and errors."""

    def __init__(
        self, config: ModelConfig, variables: Mapping[str, Any], label: str | Path, tokenizer: str | Path | None = None
    ):
        if LOW_RANK in variables:
            count = len(flatten_dict(dict(variables[LOW_RANK]))) // len(PARTS)
            self.notes = (f"low-rank weights of {count} matrices: added to them, in float32",)
            variables = merged(variables)
        saved = {name: tree for name, tree in variables.items() if name in ("params", "balance", SCALES)}
        family = native.INT8_FAMILY if SCALES in variables else native.FAMILY
        self._arrays = flatten_dict(nn.unbox(saved), sep=".")
        tensors = {name: TensorInfo(tuple(array.shape), np.dtype(array.dtype)) for name, array in self._arrays.items()}
        super().__init__(Path(label), family, config, tensors, None if tokenizer is None else to_path(tokenizer))

    def _read(self, stored_name: str) -> np.ndarray:
        return np.asarray(self._arrays[stored_name])


class DerivedSource(Source):
    """A model that is made of another one: it has its files and its text, and what was said about it holds for it."""

    def __init__(
        self, path: Path, family: Family, config: ModelConfig, tensors: Mapping[str, TensorInfo], base: Source
    ):
        super().__init__(path, family, config, tensors, base.tokenizer)
        self.base, self.notes = base, base.notes
        self.directory, self.weight_paths = base.directory, base.weight_paths
        self.overlay, self.text = base.overlay, base.text


def read_model(path: str | Path) -> tuple[ModelConfig, Path | None]:
    """The config of a model, and its `Source.tokenizer`. A model on the Hugging Face hub is not downloaded for it, if
    its `config.json` names its family."""
    if is_hub_id(path):
        file = resolve(path, weights=False) / "config.json"
        fields = read_json(file) if file.is_file() else {}
        if (family := named_family(fields)) is not None:
            tokenizer = file.with_name(TOKENIZER_FILE)
            return family.model_config(fields, str(file)), tokenizer if tokenizer.is_file() else None
    source = FileSource(path)
    return source.config, source.tokenizer


def text_of(source: Source) -> Text | None:
    """How a model reads and writes text; None if it has no tokenizer. Raises ConfigError for a damaged file."""
    if source.text is not None or source.tokenizer is None:
        return source.text
    tokenizer, vocab_size = load_tokenizer(source.tokenizer), source.config.vocab_size
    family = source.origin.family if source.origin else source.family.name
    found = read_conventions(source.tokenizer, tokenizer, source.directory, vocab_size, family, source.overlay)
    return tokenizer, found


def _accompanying_fields(
    path: Path, files: list[TensorFile], tensors: Mapping[str, TensorInfo]
) -> tuple[Mapping[str, Any] | None, Path]:
    """The config fields that come with the weights, if any, and the file they are in."""
    if path.is_dir() and (path / "config.json").is_file():
        return read_json(path / "config.json"), path / "config.json"
    first = files[0]
    return first.fields if isinstance(first, GgufFile) else embedded_fields(path, first.configs, tensors), path


def open_tensors(path: Path, weights_key: str | None = None) -> TensorFile:
    """The tensors of one file, or of a directory of torch.distributed.checkpoint."""
    if path.is_dir():
        return DcpDirectory(path, weights_key)
    if is_lfs_pointer(path):
        raise ConfigError(f"{path}: is a Git LFS pointer, not weights; run `git lfs pull` in its repository")
    kinds: dict[str, Callable[[Path], TensorFile]] = {".safetensors": SafetensorsFile, ".gguf": GgufFile}
    if path.suffix not in kinds:
        return TorchFile(path, weights_key)
    if weights_key is not None:
        raise ConfigError(f"{path}: weights_key: got {weights_key!r}, allowed only with a checkpoint of PyTorch")
    return kinds[path.suffix](path)


def _read_config(path: Path) -> ModelConfig | dict[str, Any]:
    """A reference's fields (JSON, or YAML without sections), or the model of one of our YAML files."""
    if path.suffix == ".json":
        return read_json(path)
    path = named_config(path) or path
    tree = read_yaml(path)
    return load_run_config(path).model if isinstance(tree.get("model"), dict) else tree
