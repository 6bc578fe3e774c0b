"""Sources of a model to convert or load: a directory, one file, a Hugging Face id, or variables in memory.

Tensors stay in their files until they are asked for, so that memory holds one at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from mythos_jax.config import ModelConfig, load_run_config, named_config
from mythos_jax.config.files import read_yaml
from mythos_jax.errors import ConfigError
from mythos_jax.json_text import parse_json
from mythos_jax.paths import is_lfs_pointer, to_path
from mythos_jax.porting import native
from mythos_jax.porting.families import detect, has_signature
from mythos_jax.porting.family import Family
from mythos_jax.porting.gguf_file import GgufFile
from mythos_jax.porting.hub import resolve
from mythos_jax.porting.safetensors_files import SafetensorsFile, TensorInfo
from mythos_jax.porting.torch_files import TorchFile
from mythos_jax.porting.wrappers import unwrap

# In order of preference; the first that a directory has is read.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pt",
)

# A ModelConfig, a reference's own fields, or the path of a `config.json` or of one of our YAML files.
ConfigLike = ModelConfig | Mapping[str, Any] | str | Path
TensorFile = SafetensorsFile | TorchFile | GgufFile


class Source(ABC):
    """A model to read.

    path: names it in reports and errors. tensors: those it has, under its family's names. tokenizer: its
    `tokenizer.json` if any, or the GGUF file that it is in. table: the rows that `config` asks for, whether or not the
    tensors are there. wrappers: parts of the stored names that were taken off, such as `_orig_mod.`.
    """

    wrappers: Sequence[str] = ()

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
        return self._read(self._stored_name(name))

    def parameter(self, path: str) -> np.ndarray:
        """Our parameter at `path`, in its stored dtype."""
        return self.table.read(path, self.read)

    def parameter_dtype(self, path: str) -> np.dtype:
        """The dtype of `parameter(path)`, without reading it."""
        names = self.table.tensors_of(path)
        return np.result_type(*(self.tensors[self._stored_name(name)].dtype for name in names))

    def _stored_name(self, name: str) -> str:
        if name in self.tensors:
            return name
        return next(alias for alias, tied_to in self.family.ties(self.config).items() if tied_to == name)


class FileSource(Source):
    """A model in a directory, in one file, or on the Hugging Face hub.

    config: required for a file that holds only tensors; elsewhere it replaces the config that comes with them.
    Raises ConfigError: nothing there, damaged, or no config.
    """

    def __init__(self, path: str | Path, config: ConfigLike | None = None):
        path = resolve(path)
        files = [_open(file) for file in (weight_files(path) if path.is_dir() else [path])]
        file_of = {name: file for file in files for name in file.tensors}
        stored_names, self.wrappers = unwrap(file_of, has_signature, path)
        self._stored = {name: (file_of[stored], stored) for name, stored in stored_names.items()}
        infos = {name: file.tensors[stored] for name, (file, stored) in self._stored.items()}
        tensors = {name: TensorInfo(info.shape, np.dtype(info.dtype)) for name, info in infos.items()}
        fields, config_path = _accompanying_fields(path, files)
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
        if config is None:
            config = family.model_config(fields or {}, str(config_path))
        # A GGUF file has its tokenizer in itself.
        tokenizer = path if files[0].path.suffix == ".gguf" else path / "tokenizer.json"
        try:
            super().__init__(path, family, config, tensors, tokenizer if tokenizer.is_file() else None)
        except AssertionError:  # for a config that came with the tensors, it would be our own mistake
            if config_path == path:
                raise
            raise ConfigError(
                f"{config_path}: is not the config of {path}, whose tensors are those of a {family.name} model"
            ) from None

    def _read(self, stored_name: str) -> np.ndarray:
        file, name = self._stored[stored_name]
        return file.read(name)


class VariablesSource(Source):
    """A model in memory, in our own format. `label` names it in reports and errors."""

    def __init__(
        self, config: ModelConfig, variables: Mapping[str, Any], label: str | Path, tokenizer: str | Path | None = None
    ):
        saved = {name: tree for name, tree in variables.items() if name in ("params", "balance")}
        self._arrays = flatten_dict(nn.unbox(saved), sep=".")
        tensors = {name: TensorInfo(tuple(array.shape), np.dtype(array.dtype)) for name, array in self._arrays.items()}
        super().__init__(Path(label), native.FAMILY, config, tensors, None if tokenizer is None else to_path(tokenizer))

    def _read(self, stored_name: str) -> np.ndarray:
        return np.asarray(self._arrays[stored_name])


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's tensors. Raises ConfigError if there are none, or several candidates."""
    for name in WEIGHT_FILES:
        path = directory / name
        if path.is_file():
            return _shards(path) if name.endswith(".index.json") else [path]
    candidates = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".pt", ".bin", ".gguf"))
    if len(candidates) == 1:
        return candidates
    got = ", ".join(path.name for path in candidates) or "none"
    raise ConfigError(
        f"{directory}: got weight files: {got}, allowed: one .safetensors, .pt, .bin or .gguf, or an index"
    )


def _shards(index_path: Path) -> list[Path]:
    """The files that an index names."""
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ConfigError(f"{index_path}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:  # an index must not name files anywhere else on the disk
            raise ConfigError(f"{index_path}: got shard {name!r}, allowed: names of files in the same directory")
        if not (index_path.parent / name).is_file():
            raise ConfigError(f"{index_path}: names shard {name}, which is missing")
    return [index_path.parent / name for name in names]


def _accompanying_fields(path: Path, files: list[TensorFile]) -> tuple[Mapping[str, Any] | None, Path]:
    """The config fields that come with the weights, if any, and the file they are in."""
    if not path.is_dir():
        return files[0].fields, path
    config_json = path / "config.json"
    return (_read_json(config_json) if config_json.is_file() else None), config_json


def _open(path: Path) -> TensorFile:
    if is_lfs_pointer(path):
        raise ConfigError(f"{path}: is a Git LFS pointer, not weights; run `git lfs pull` in its repository")
    kinds: dict[str, Callable[[Path], TensorFile]] = {".safetensors": SafetensorsFile, ".gguf": GgufFile}
    return kinds.get(path.suffix, TorchFile)(path)


def _read_json(path: Path) -> dict[str, Any]:
    if is_lfs_pointer(path):
        raise ConfigError(f"{path}: is a Git LFS pointer, not JSON; run `git lfs pull` in its repository")
    try:
        tree = parse_json(path.read_bytes(), unique_keys=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, allowed: an object with the model's fields")
    return tree


def _read_config(path: Path) -> ModelConfig | dict[str, Any]:
    """A reference's fields (JSON, or YAML without sections), or the model of one of our YAML files."""
    if path.suffix == ".json":
        return _read_json(path)
    path = named_config(path) or path
    tree = read_yaml(path)
    return load_run_config(path).model if isinstance(tree.get("model"), dict) else tree
