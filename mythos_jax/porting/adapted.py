"""Models with the low-rank weights of a PEFT directory: they are read like any other, merged."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from mythos_jax.data.tokenizer import TOKENIZER_FILE
from mythos_jax.errors import ConfigError
from mythos_jax.porting import native
from mythos_jax.porting.family import Family
from mythos_jax.porting.hub import resolve
from mythos_jax.porting.peft import family_for, is_adapter, read_adapter
from mythos_jax.porting.peft_config import AdapterConfig, read_adapter_config
from mythos_jax.porting.reading import ConfigLike, DerivedSource, FileSource, Source

T = TypeVar("T")


class AdaptedSource(DerivedSource):
    """A base with the low-rank weights of a PEFT directory added to its matrices, in float32.

    keep_dtype: round the sums to the dtype of the base's matrices, as PEFT's own `merge_and_unload` does.
    """

    def __init__(self, directory: Path, config: AdapterConfig, base: Source, keep_dtype: bool = False):
        family = _original_family(base, directory)
        adapter = read_adapter(directory, config, family.table(base.config), str(base.path))
        self._adapter, self._keep_dtype = adapter, keep_dtype
        self._modules = {module.path: module for module in adapter.modules}
        super().__init__(directory, base.family, base.config, base.tensors, base)
        self.wrappers, self.origin = base.wrappers, base.origin
        notes = [*base.notes, *adapter.notes]
        if (directory / TOKENIZER_FILE).is_file():  # it may have tokens and a chat template of its own
            self.tokenizer, self.overlay, self.text = directory / TOKENIZER_FILE, directory, None
            notes.append(f"{directory}: its own {TOKENIZER_FILE} and settings of text are used")
        self.notes = notes

    def _read(self, stored_name: str) -> np.ndarray:
        return self.base.read(stored_name)

    def parameter(self, path: str) -> np.ndarray:
        base = self.base.parameter(path)
        if path not in self._modules:
            return base
        merged = base.astype(np.float32) + self._adapter.product(self._modules[path])
        return merged.astype(self.parameter_dtype(path))

    def parameter_dtype(self, path: str) -> np.dtype:
        keep = self._keep_dtype or path not in self._modules
        return self.base.parameter_dtype(path) if keep else np.dtype(np.float32)


def open_pretrained(
    path: str | Path,
    config: ConfigLike | None = None,
    *,
    base: str | None = None,
    open_base: Callable[[str], Source] = FileSource,
    keep_dtype: bool = False,
) -> Source:
    """A pretrained model: as `FileSource`, or a PEFT directory with its base.

    base: replaces the `base_model_name_or_path` of a PEFT directory. open_base: how that model is opened. keep_dtype:
    as in `AdaptedSource`. Raises ConfigError.
    """
    local = resolve(path)
    if is_adapter(local):
        if config is not None:
            raise ConfigError(f"{local}: got a config, allowed: none, since a PEFT directory has that of its base")
        return _open_adapted(local, open_base, base, keep_dtype)
    if base is not None:
        raise ConfigError(f"--base: got {base}, allowed only with a PEFT directory, which {path} is not")
    return FileSource(local, config)


def of_base(path: str | Path, read: Callable[[str], T]) -> T | None:
    """What `read` gives for the name of the base of a PEFT directory; None for another model. Raises ConfigError."""
    local = resolve(path, weights=False)
    return _at_base(read_adapter_config(local), None, read) if is_adapter(local) else None


def tokenizer_of(path: str | Path) -> Path | None:
    """The `tokenizer.json` that a PEFT directory may have beside its base's."""
    file = resolve(path, weights=False) / TOKENIZER_FILE
    return file if file.is_file() else None


def _base_name(config: AdapterConfig, given: str | None = None) -> str:
    """given: replaces `base_model_name_or_path`."""
    name = given or config.base
    if name is None:
        raise ConfigError(f"{config.where}: base_model_name_or_path: got nothing, allowed: a model; or --base MODEL")
    if is_adapter(name):
        raise ConfigError(f"{config.where}: base_model_name_or_path: got {name}, an adapter, allowed: a whole model")
    if given is None and not Path(name).exists() and config.revision not in (None, "main"):
        raise ConfigError(f"{config.where}: revision: got {config.revision!r}, allowed: null or main; or --base MODEL")
    return name


def _at_base(config: AdapterConfig, given: str | None, read: Callable[[str], T]) -> T:
    """What `read` gives for the base's name. Raises ConfigError, which names the file that has the name."""
    name = _base_name(config, given)
    try:
        return read(name)
    except ConfigError as error:
        if given is not None or Path(name).exists():
            raise
        raise ConfigError(f"{config.where}: base_model_name_or_path: {error}; or --base MODEL") from None


def _open_adapted(directory: Path, open_base: Callable[[str], Source], given: str | None, keep_dtype: bool) -> Source:
    config = read_adapter_config(directory)
    return AdaptedSource(directory, config, _at_base(config, given, open_base), keep_dtype)


def _original_family(base: Source, directory: Path) -> Family:
    """The format whose names of tensors PEFT knows the base by."""
    if base.family not in native.FAMILIES:
        return base.family
    return family_for(base.config, base.origin.family if base.origin else None, str(directory))
