"""A complete directory: config, tensors, and the other files that the loaders of the model's family look for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mythos_jax.data.conventions import (
    gguf_files,
    settings_files,
    token_ids,
)
from mythos_jax.data.tokenizer import TOKENIZER_FILE
from mythos_jax.porting import native
from mythos_jax.porting.companions import TEMPLATES, Companions, Content, companions_of, local_modules
from mythos_jax.porting.family import Family
from mythos_jax.porting.origin import BUFFERS_FILE, FIELDS_FILE, Origin
from mythos_jax.porting.reading import Source, Text, text_of
from mythos_jax.porting.writing import (
    SHARD_BYTES,
    WrittenTensors,
    new_directory,
    save_safetensors,
    write_pytorch_bin,
    write_tensors,
)


@dataclass
class Written:
    """What a directory contains. tensors: shape and dtype by name. copied, made: other files, taken from the source or
    written anew; left: files of the source that were not taken. notes: sentences about the config."""

    tensors: WrittenTensors
    copied: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_directory(
    path: str | Path,
    source: Source,
    family: Family,
    *,
    more: Mapping[str, bytes] = MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Written:
    """Writes a source whose tensors are known to fit its config as a new directory in the format of `family`.

    more: other files of the directory, by name.
    Raises ConfigError: the directory exists; the format cannot express the model (every reason is listed); a file that
    belongs to the source cannot be read.
    """
    origin, notes = _usable_origin(source, family)
    text = _text(source)
    companions = _companions(source, family)
    fields = dict(origin.fields) if origin else {}
    if text is not None and family.dtype_fields:
        fields = {**token_ids(*text), **fields}
    missing = [file for file in local_modules(fields.get("auto_map")) if file not in companions.copied]
    if missing and family not in native.FAMILIES:
        del fields["auto_map"]
        where = "the published code" if family.auto_map else "no code"
        notes.append(f"config.json: not in {source.path}: {', '.join(missing)}; auto_map names {where} instead")
    config_json = family.config_json(source.config, _dtype(source), fields)
    table = family.table(source.config)
    if family is native.INT8_FAMILY and source.family is not native.INT8_FAMILY:
        notes.append(f"rounded to int8: {len(table.int8)} matrices")
    with new_directory(path) as directory:
        _write_json(directory / "config.json", config_json)
        companions.write(directory)
        for name, content in more.items():
            (directory / name).write_bytes(content)
        buffers = _buffers(source, family, origin)
        if family in native.FAMILIES:
            _keep_origin(directory, source.origin, text)
        if family.pytorch_bin:
            tensors = write_pytorch_bin(directory, table, source.parameter, buffers, progress)
        else:
            tensors = write_tensors(
                directory, table, source.parameter, source.parameter_dtype, buffers, shard_bytes, progress
            )
    return Written(tensors, [*companions.copied], [*companions.made], [*companions.left], notes)


def _usable_origin(source: Source, family: Family) -> tuple[Origin | None, list[str]]:
    """The origin of a model whose own format is asked for and that is still what it was there, else why it is not."""
    origin = source.origin
    if origin is None or origin.family != family.name:
        return None, []
    changed = family.changed_by(origin.fields, source.config)
    if not changed:
        return origin, []
    names = ", ".join(f"model.{name}" for name in changed)
    return None, [f"config.json: only what our config says, because the model differs from its source in {names}"]


def companion_files(source: Source) -> dict[str, Content]:
    """The files of a model that our own format has besides its config, its weights and its origin."""
    found = _companions(source, native.FAMILY)
    return {**found.copied, **found.made}


def origin_fields(source: Source) -> dict[str, Any] | None:
    """What our own format has in `source_config.json`, if anything."""
    return None if source.origin is None else _origin_fields(source.origin, _text(source))


def _companions(source: Source, family: Family) -> Companions:
    found = _stored_companions(source, family)
    if source.overlay is not None:
        found = found.with_text_of(source.overlay)
    made = _settings(source, family)
    # What is made is newer; a template in a file of its own would count more.
    copied = {name: file for name, file in found.copied.items() if not made or name not in {*made, *TEMPLATES}}
    return replace(found, copied=copied, made={**made, **found.made})


def _stored_companions(source: Source, family: Family) -> Companions:
    if source.directory is not None:
        same_code = family in native.FAMILIES or (source.origin is not None and source.origin.family == family.name)
        found = companions_of(source.directory, source.weight_paths, with_code=same_code)
        copied = dict(found.copied)
        if source.tokenizer is not None:
            copied.setdefault(TOKENIZER_FILE, source.tokenizer.read_bytes)
        return replace(found, copied=copied)
    if source.tokenizer is None:
        return Companions()
    if source.tokenizer.suffix == ".gguf":
        files = gguf_files(source.tokenizer)
        return Companions(made={name: partial(bytes, content) for name, content in files.items()})
    return Companions({TOKENIZER_FILE: source.tokenizer.read_bytes})


def _settings(source: Source, family: Family) -> dict[str, Content]:
    """Files that say how a model in memory reads and writes text; our own format needs them for conversations only."""
    if source.text is None or (family in native.FAMILIES and source.text[1].chat_template is None):
        return {}
    return {name: partial(bytes, content) for name, content in settings_files(*source.text).items()}


def _text(source: Source) -> Text | None:
    """How the model reads text, if that is known otherwise than by files that are copied."""
    is_gguf = source.tokenizer is not None and source.tokenizer.suffix == ".gguf"
    return text_of(source) if is_gguf else source.text


def _buffers(source: Source, family: Family, origin: Origin | None) -> dict[str, np.ndarray]:
    """The tables that the original stores: those of the source, bit by bit, if they have the shape of ours."""
    buffers = family.stored_buffers(source.config)
    for name, read in (origin.buffers if origin else {}).items():
        if name in buffers and (array := read()).shape == buffers[name].shape:
            buffers[name] = array
    return buffers


def _keep_origin(directory: Path, origin: Origin | None, text: Text | None) -> None:
    if origin is None:
        return
    _write_json(directory / FIELDS_FILE, _origin_fields(origin, text))
    if origin.buffers:
        save_safetensors({name: read() for name, read in origin.buffers.items()}, directory / BUFFERS_FILE)


def _origin_fields(origin: Origin, text: Text | None) -> dict[str, Any]:
    return {"family": origin.family, "config": {**(token_ids(*text) if text else {}), **origin.fields}}


def _dtype(source: Source) -> str:
    """The dtype of most of a source's numbers."""
    sizes: dict[str, int] = {}
    for path, shape in source.table.our_shapes.items():
        name = source.parameter_dtype(path).name
        sizes[name] = sizes.get(name, 0) + int(np.prod(shape))
    return max(sizes, key=lambda name: sizes[name])


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
