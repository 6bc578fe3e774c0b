"""Opening a model wherever it is: a directory, one file, or a name on the Hugging Face hub.

Tensors stay in their files until one is asked for, so that memory holds one at a time.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

from mythos_jax.config import ModelConfig, load_run_config
from mythos_jax.errors import ConfigError
from mythos_jax.porting.families import FAMILIES, NATIVE, Family, recognise
from mythos_jax.porting.tables import Shape, Table
from mythos_jax.porting.torch_files import TorchFile
from mythos_jax.typed import read_yaml

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}
# In this order; the first that a directory has is read.
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pt",
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Config = ModelConfig | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: Shape
    dtype: np.dtype


class SafetensorsFile:
    """The tensors of one `.safetensors` file. Raises ConfigError: not one, cut off, or damaged."""

    fields = None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np") as file:
                self.tensors = {name: self._stored(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ConfigError(f"{self.path}: damaged or cut off safetensors file ({_line(error)})") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({_line(error)})") from None

    def _stored(self, name: str, part: Any) -> Stored:
        if part.get_dtype() not in DTYPES:
            raise ConfigError(f"{self.path}: {name}: dtype {part.get_dtype()}, allowed: {', '.join(DTYPES)}")
        return Stored(tuple(part.get_shape()), np.dtype(DTYPES[part.get_dtype()]))

    def read(self, name: str) -> np.ndarray:
        try:
            # Opened anew each time: a mapping that stays would count all that was ever read as memory in use.
            with safe_open(self.path, framework="np") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.path}: {name} cannot be read ({_line(error)})") from None


class Source:
    """A model to be read: its family, its config, its tensors by the family's names, its tokenizer file if any."""

    def __init__(self, path: str | Path, config: Config | None = None):
        """config: for a file that holds tensors only; a ModelConfig, a reference's fields, or the path of a
        `config.json` or of one of our YAML files. Given, it wins over what the model's directory says."""
        self.path = resolve(path)
        if self.path.is_dir():
            self.files = [_open(file) for file in weight_files(self.path)]
            settings, tokenizer = self.path / "config.json", self.path / "tokenizer.json"
            self.tokenizer = tokenizer if tokenizer.is_file() else None
            fields = _read_json(settings) if settings.is_file() else None
        else:
            self.files, self.tokenizer = [_open(self.path)], None
            settings, fields = self.path, self.files[0].fields
        if isinstance(config, str | Path):
            settings, config = Path(config), _read_config(Path(config))
        if isinstance(config, Mapping):
            fields, config = config, None
        self.tensors = {name: Stored(t.shape, np.dtype(t.dtype)) for f in self.files for name, t in f.tensors.items()}
        self._file_of = {name: file for file in self.files for name in file.tensors}
        if config is None and fields is None:
            raise ConfigError(
                f"{self.path}: holds tensors only, which do not tell heads or RoPE base; give its config "
                "(a config.json, or one of our YAML files)"
            )
        self.family: Family = recognise(None if config else fields, self.tensors, str(settings))
        self.config: ModelConfig = config or self.family.model_config(fields, str(settings))
        self.table: Table = self.family.table(self.config)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file; a tied one under either of its names."""
        name = self._stored_name(name)
        return self._file_of[name].read(name)

    def _stored_name(self, name: str) -> str:
        if name in self.tensors:
            return name
        return next(alias for alias, key in self.family.tied.items() if key == name)

    def parameter(self, path: str) -> np.ndarray:
        """Our parameter of this path, in the dtype of the file."""
        return self.table.read(path, self.read)

    def parameter_dtype(self, path: str) -> np.dtype:
        """Its dtype, told without reading it."""
        stored = [self.tensors[self._stored_name(name)].dtype for name in self.table.sources(path)]
        return np.result_type(*stored)


class VariablesSource(Source):
    """A model in memory as a source, in our own format. `label` names it in reports and errors."""

    def __init__(
        self, config: ModelConfig, variables: Mapping[str, Any], label: str | Path, tokenizer: str | Path | None = None
    ):
        self.path, self.tokenizer = Path(label), None if tokenizer is None else Path(tokenizer)
        self.family, self.config = FAMILIES[NATIVE], config
        self.table = self.family.table(config)
        kept = {name: tree for name, tree in variables.items() if name in ("params", "balance")}
        self._arrays = flatten_dict(nn.unbox(kept), sep=".")
        self.tensors = {name: Stored(tuple(a.shape), np.dtype(a.dtype)) for name, a in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._arrays[name])


def resolve(path: str | Path) -> Path:
    """The local file or directory; a name `owner/name` that is no local path is fetched from the hub."""
    local = Path(path)
    if local.exists():
        return local
    if isinstance(path, str) and HUB_ID.fullmatch(path) and not local.parent.exists():
        return _download(path)
    raise ConfigError(f"{path}: no such file or directory, and not a Hugging Face id (owner/name)")


def _download(repository: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what goes wrong is said once, below
    try:
        names = [file.rfilename for file in HfApi().model_info(repository).siblings or []]
        wanted = ["*.safetensors"] if any(name.endswith(".safetensors") for name in names) else ["*.bin", "*.pt"]
        return Path(snapshot_download(repository, allow_patterns=["*.json", *wanted]))
    except Exception as error:  # many kinds: no network, no such repository, not allowed to see it
        try:
            return Path(snapshot_download(repository, local_files_only=True))  # fetched before
        except Exception:
            raise ConfigError(
                f"{repository}: no local path, and it cannot be fetched from the Hugging Face hub "
                f"({type(error).__name__}: {_line(error)[:160]})"
            ) from None
    finally:
        logging.set_verbosity(verbosity)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's tensors. Raises ConfigError: none, or several that may be meant."""
    for name in WEIGHTS:
        path = directory / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        index = _read_json(path).get("weight_map")
        if not isinstance(index, Mapping) or not index:
            raise ConfigError(f"{path}: no weight_map")
        shards = sorted({str(shard) for shard in index.values()})
        for shard in shards:
            if Path(shard).name != shard:
                raise ConfigError(f"{path}: got shard {shard!r}, allowed: names of files beside it")
            if not (directory / shard).is_file():
                raise ConfigError(f"{path}: names shard {shard}, which is missing")
        return [directory / shard for shard in shards]
    found = sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".pt", ".bin"))
    if len(found) == 1:
        return found
    got = ", ".join(p.name for p in found) if found else "none"
    raise ConfigError(f"{directory}: got weight files: {got}, allowed: one .safetensors, .pt or .bin, or an index")


def _open(path: Path) -> SafetensorsFile | TorchFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, allowed: an object with the model's fields")
    return tree


def _read_config(path: Path) -> ModelConfig | dict[str, Any]:
    """A reference's fields (JSON, or a YAML file without sections), or the model of one of our YAML files."""
    if path.suffix == ".json":
        return _read_json(path)
    tree = read_yaml(path)
    return load_run_config(path).model if isinstance(tree.get("model"), dict) else tree


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
