"""The tokenizer of a run's data, which models that the run uses beside its own must have, too."""

from dataclasses import replace

from mythos_jax.config import Config
from mythos_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.porting.hub import local_tokenizer
from mythos_jax.processes import process_zero_first
from mythos_jax.runs.load import LoadedModel


def with_local_tokenizer(config: Config) -> Config:
    """With the path of the tokenizer's file in place of a word or a hub id, from where process 0 may download it."""
    name = config.data.tokenizer
    local = process_zero_first("data.tokenizer", lambda: local_tokenizer(name))
    return replace(config, data=replace(config.data, tokenizer=local))


def check_tokenizers(config: Config, loaded: LoadedModel, path: str, because: str) -> None:
    """Raises ConfigError if a model reads text with another tokenizer than this config's data. because: why it may
    not."""
    spec, end = loaded.tokenizer_spec, config.data.end_of_document
    if not config.data.uses_tokenizer or spec is None:
        return
    if loaded.trained_on.tokenizer is not None:
        theirs = loaded.trained_on.tokenizer["fingerprint"]
    else:
        theirs = load_tokenizer(spec, None if spec == ByteTokenizer.name else end).fingerprint
    if load_tokenizer(with_local_tokenizer(config).data.tokenizer, end).fingerprint != theirs:
        raise ConfigError(
            f"data.tokenizer: got {config.data.tokenizer}, allowed: the tokenizer of {path}, {spec}, because {because}"
        )
