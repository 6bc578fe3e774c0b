"""The files of the pretrained model that a run started from, beside its weights: kept in the run, for when the run is
converted, or talks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from mythos_jax.data.conventions import SETTINGS_FILE, TextConventions, documents, read_conventions, stored_conventions
from mythos_jax.data.tokenizer import TOKENIZER_FILE, HuggingFaceTokenizer, Tokenizer
from mythos_jax.paths import to_path, write_whole
from mythos_jax.porting.adapted import of_base, open_pretrained
from mythos_jax.porting.companions import LEGAL, Content
from mythos_jax.porting.origin import BUFFERS_FILE, FIELDS_FILE, read_origin
from mythos_jax.porting.reading import Source
from mythos_jax.porting.saving import companion_files, origin_fields
from mythos_jax.runs.configs import FOLDER, is_run

ORIGIN = (FIELDS_FILE, BUFFERS_FILE)  # files that are not about text


def keep_source(init_from: str, run_dir: Any, with_text: bool) -> None:
    """Copies what belongs to the model that a run starts from into the run: the fields of its `config.json` that our
    config has no word for, tokenizer, chat template, settings of generation, licence. A run passes on what it has.

    with_text: also the files about text, which mean nothing for tokens that are not the model's.
    """
    folder = run_dir / FOLDER
    files = _files_of(init_from)
    if not with_text:
        files = {name: content for name, content in files.items() if name in ORIGIN or LEGAL.fullmatch(Path(name).name)}
    if folder.is_dir():  # of a start that was killed before its first checkpoint
        for file in folder.iterdir():
            file.unlink()
    if files:
        folder.mkdir(exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content())


def _files_of(init_from: str) -> dict[str, Content]:
    """How to get the content of each file, by name."""
    base = init_from if is_run(init_from) else of_base(init_from, str)
    if base is not None and is_run(base):
        theirs = to_path(base) / FOLDER
        return {file.name: file.read_bytes for file in theirs.iterdir()} if theirs.is_dir() else {}
    source = open_pretrained(init_from)
    files = dict(companion_files(source))
    if (fields := origin_fields(source)) is not None:
        files[FIELDS_FILE] = lambda: json.dumps(fields, indent=1).encode() + b"\n"
    if source.origin is not None and (buffers := source.origin.buffers):
        files[BUFFERS_FILE] = lambda: save({name: read() for name, read in buffers.items()}, metadata={"format": "pt"})
    return files


def add_to(source: Source, run_dir: Any) -> None:
    """Gives a run that is converted what belongs to the model that it started from."""
    folder = run_dir / FOLDER
    if folder.is_dir():
        source.directory, source.origin = folder, read_origin(folder)
        if (folder / TOKENIZER_FILE).is_file() and not (run_dir / SETTINGS_FILE).is_file():
            source.text = None  # the files beside it say that


def conventions(run_dir: Any, tokenizer: Tokenizer, vocab_size: int) -> TextConventions:
    """Those of a run on conversations are its own. Of another, a text starts as in prepared data; an answer ends, and a
    conversation is written, as in the model that the run started from, if that had this tokenizer."""
    if stored := stored_conventions(run_dir, tokenizer, vocab_size):
        return stored
    own, folder = documents(tokenizer), run_dir / FOLDER
    file = folder / TOKENIZER_FILE
    if not file.is_file() or HuggingFaceTokenizer(file).fingerprint != tokenizer.fingerprint:
        return own
    origin = read_origin(folder)
    theirs = read_conventions(file, tokenizer, folder, vocab_size, origin.family if origin else None)
    return replace(theirs, first_tokens=own.first_tokens, prefix_token=own.prefix_token)
