"""The prepared data of a config: used if it is there and fits, else prepared."""

from pathlib import Path

from mythos_jax.config import Config, DataConfig
from mythos_jax.data.chat_encoder import make_chat_encoder
from mythos_jax.data.input_file import RECORD_SUFFIXES, SUFFIXES
from mythos_jax.data.manifest import MANIFEST_FILE, Manifest, load_manifest
from mythos_jax.data.prepare import check_chat, check_request, check_tokenizer, have_changed, prepare, with_inputs
from mythos_jax.data.sources import find_inputs
from mythos_jax.data.tokenizer import Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError, StorageError
from mythos_jax.streams import log
from mythos_jax.typed import check_field


def ensure_prepared(
    config: Config,
    *,
    progress: bool = True,
    path: str | Path | None = None,
    prepare_missing: bool = True,
    resumes: bool = False,
) -> Manifest:
    """The manifest of the data that a config trains on; prepares `config.data_path` first if it is missing.

    path: another folder, such as a part of a mixture. prepare_missing: False if another process has prepared it.
    resumes: whether the rows have been trained on, so that text that has changed since is announced, not refused.

    Raises ConfigError: as `prepare` does; nothing prepared and no `data.sources`; a folder prepared with another
    seq_len, tokenizer or (if the config names sources) from other text; a damaged folder; a tokenizer whose
    vocabulary exceeds the model's.
    """
    data, folder = config.data, Path(path or config.data_path)
    tokenizer = load_tokenizer(data.tokenizer, data.end_of_document)
    allowed = f"at least {tokenizer.vocab_size}, the vocabulary of tokenizer {data.tokenizer}"
    check_field(config.model.vocab_size >= tokenizer.vocab_size, "model.vocab_size", config.model.vocab_size, allowed)
    if (folder / MANIFEST_FILE).exists():
        manifest = load_manifest(folder)
        check_tokenizer(manifest, folder, tokenizer, "data.tokenizer")
        if data.sources or data.chat:
            # A run that is evaluated has the tokenizer and the template as files of its own.
            template = _chat_template(data, tokenizer) if prepare_missing else None
            check_chat(manifest, folder, data.chat, template, prefix="data.")
        requested: dict[str, object] = {"seq_len": data.seq_len}
        if data.sources:
            requested |= {
                "sources": data.sources,
                "held_out_fraction": data.held_out_fraction,
                "max_bytes": data.max_bytes,
                "text_column": data.text_column,
            }
        check_request(manifest, folder, requested, prefix="data.")
        if data.sources and prepare_missing:
            _check_sources(manifest, data, folder, resumes)
        return manifest
    if not prepare_missing:
        raise ConfigError(f"data.path: nothing prepared at {folder}; allowed: a folder that all processes share")
    if data.mixture:
        raise ConfigError(f"data.mixture: nothing prepared at {folder}; allowed: folders made by `mythos data prepare`")
    if not data.sources:
        raise ConfigError(f"data.path: nothing prepared at {folder}, and data.sources names nothing to prepare it from")
    return prepare(
        data.sources,
        folder,
        tokenizer=data.tokenizer,
        end_of_document=data.end_of_document,
        seq_len=data.seq_len,
        held_out_fraction=data.held_out_fraction,
        max_bytes=data.max_bytes,
        text_column=data.text_column,
        chat=data.chat,
        chat_template=data.chat_template,
        progress=progress,
    )


def _chat_template(data: DataConfig, tokenizer: Tokenizer) -> str | None:
    """The hash of what conversations are written with; None for data of text."""
    if not data.chat:
        return None
    return make_chat_encoder(data.tokenizer, tokenizer, data.chat_template, data.seq_len).fingerprint


def _check_sources(manifest: Manifest, data: DataConfig, folder: Path, resumes: bool) -> None:
    """Raises ConfigError, or says so, if the files behind `data.sources` are not those that `folder` was made from."""
    try:
        found = find_inputs(data.sources, True, RECORD_SUFFIXES if data.chat else SUFFIXES)
    except (ConfigError, StorageError):
        return  # the sources cannot be read from this machine, and are not needed
    current = with_inputs(manifest, found)
    if current.inputs == manifest.inputs or current.times == manifest.times:
        return
    since = f"since {folder} was prepared"
    if not have_changed(manifest, current):
        log(
            f"data.sources: their times differ from when {folder} was prepared, and the text may be another one; the "
            "rows are used as they are; delete that folder to prepare it anew"
        )
    elif resumes:
        log(f"data.sources: the text has changed {since}; the run goes on with the rows that it was started with")
    else:
        raise ConfigError(
            f"data.sources: the text has changed {since}; allowed: delete that folder, and it is prepared anew, or "
            "data.sources [] to train on it as it is"
        )
