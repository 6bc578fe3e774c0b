"""What a model's own files say about its text: what it starts with, what ends an answer, the chat template.

Of a directory in the Hugging Face layout, the tokenizer's files come first: the post-processor of `tokenizer.json`,
`tokenizer_config.json`, `special_tokens_map.json`. `config.json` and `generation_config.json` add tokens that end an
answer; their beginning of text is used only where no tokenizer file names one. A GGUF file has it all in its metadata.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mythos_jax.data.gguf import open_gguf, tokenizer_json
from mythos_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.paths import read_json, to_path, write_whole

# Beginnings of text that tokenizers without any other file are known by: Huginn's and Parcae's.
BEGIN_NAMES = ("<|begin_text|>", "<|bos|>")
# What ends a turn in the chat templates of published models, besides the end of the text.
END_OF_TURN_NAMES = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_turn|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eot|>",
    "<|EOT|>",
)
SETTINGS_FILE = "tokenizer_config.json"  # of a tokenizer
GENERATION_FILE = "generation_config.json"
# The last is where our own format keeps the `config.json` that a model was published with.
SETTINGS_FILES = (GENERATION_FILE, "config.json", "source_config.json")
NAMED_IN_CONFIG = ("bos_token", "eos_token", "pad_token")
BORROWED_IDS = ("raven", "raven_olmo")  # their config.json has Huginn's ids, which mean nothing in their vocabularies
BEGIN_ALWAYS = ("huginn", "parcae")  # their own loaders put the beginning of text, whatever the tokenizer does


@dataclass(frozen=True)
class TextConventions:
    """What belongs to a model's text besides the text.

    first_tokens: ids that a text starts with; none for many models. prefix_token: the id that an empty text starts
    with, and the first token of a text is predicted from: the beginning of text if there is one, else the end.
    stop_tokens: ids that end an answer. chat_template: Jinja. special_tokens: texts by name, such as `bos_token`.
    """

    first_tokens: tuple[int, ...]
    prefix_token: int
    stop_tokens: tuple[int, ...]
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def begin(self, tokens: Iterable[int]) -> list[int]:
        """A text's tokens after those that it starts with, unless it has them already; never none at all."""
        row, first = list(tokens), list(self.first_tokens)
        return (row if row[: len(first)] == first else [*first, *row]) or [self.prefix_token]


def documents(tokenizer: Tokenizer) -> TextConventions:
    """Those of data that this package prepared: an end-of-document token before every text, and after it."""
    end = tokenizer.end_of_document
    return TextConventions((end,), end, (end,))


def read_conventions(
    spec: str | Path,
    tokenizer: Tokenizer,
    directory: Path | None,
    vocab_size: int,
    family: str | None = None,
    overlay: Path | None = None,
) -> TextConventions:
    """Those of a pretrained model.

    spec: where its tokenizer is from, as for `load_tokenizer`; other files of the tokenizer are beside it.
    directory: the model's. vocab_size: its; it cannot say other ids. family: its format. overlay: a directory whose
    settings of generation, if it has any, replace the model's.

    Raises ConfigError, naming file and field, for a file that is damaged or says what cannot be.
    """
    if spec == ByteTokenizer.name:
        return documents(tokenizer)
    path = to_path(spec)
    if path.suffix == ".gguf":
        return _of_gguf(path, tokenizer, vocab_size)
    folder = path if path.is_dir() else path.parent
    files = [] if directory is None else [directory / name for name in SETTINGS_FILES]
    if overlay is not None and (overlay / GENERATION_FILE).is_file():
        files = [overlay / GENERATION_FILE, *files[1:]]
    return _of_files(folder, tokenizer, files, vocab_size, family)


def gguf_files(path: Path) -> dict[str, bytes]:
    """The tokenizer and the conventions of a GGUF file, as files of a directory in the Hugging Face layout."""
    tokenizer = load_tokenizer(path)
    found = _of_gguf(path, tokenizer, tokenizer.vocab_size)
    return {TOKENIZER_FILE: tokenizer_json(path), **settings_files(tokenizer, found)}


def settings_files(tokenizer: Tokenizer, conventions: TextConventions) -> dict[str, bytes]:
    """`tokenizer_config.json` and `generation_config.json`, for a model that has only a tokenizer."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(conventions.first_tokens),
        **_named_tokens(tokenizer, conventions),
    }
    if conventions.chat_template is not None:
        settings["chat_template"] = conventions.chat_template
    ids = {**token_ids(tokenizer, conventions), "eos_token_id": list(conventions.stop_tokens)}
    trees = {"tokenizer_config.json": settings, "generation_config.json": ids}
    return {name: json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n" for name, tree in trees.items()}


def save_conventions(directory: str | Path, tokenizer: Tokenizer, conventions: TextConventions) -> None:
    """Writes them beside a tokenizer, where `stored_conventions` finds them."""
    for name, content in settings_files(tokenizer, conventions).items():
        write_whole(to_path(directory) / name, content)


def stored_conventions(directory: str | Path, tokenizer: Tokenizer, vocab_size: int) -> TextConventions | None:
    """Those of prepared conversations, or of a run that was trained on them; None for a directory of neither.

    Raises ConfigError if a file is damaged.
    """
    folder = to_path(directory)
    settings_file = folder / SETTINGS_FILE
    if not settings_file.is_file():
        return None
    if tokenizer.fingerprint == ByteTokenizer.fingerprint:
        template = _template(read_json(settings_file).get("chat_template"), settings_file, "chat_template")
        return replace(documents(tokenizer), chat_template=template)
    return _of_files(folder, tokenizer, [folder / name for name in SETTINGS_FILES], vocab_size, None)


def token_ids(tokenizer: Tokenizer, conventions: TextConventions) -> dict[str, int]:
    """The fields of a `config.json` that name tokens."""
    names = _named_tokens(tokenizer, conventions)
    ids = {f"{name}_id": tokenizer.token_id(names[name]) for name in NAMED_IN_CONFIG if name in names}
    return {name: number for name, number in ids.items() if number is not None}


def _named_tokens(tokenizer: Tokenizer, conventions: TextConventions) -> dict[str, str]:
    """The texts of special tokens by name; where none is named, what texts start with and the end of a document."""
    usual = {"bos_token": conventions.first_tokens[:1], "eos_token": (tokenizer.end_of_document,)}
    texts = {name: tokenizer.token_text(number) for name, numbers in usual.items() for number in numbers}
    return {**{name: text for name, text in texts.items() if text is not None}, **conventions.special_tokens}


def _of_files(
    folder: Any, tokenizer: Tokenizer, files: Sequence[Any], vocab_size: int, family: str | None
) -> TextConventions:
    settings_file, map_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings, token_map = _read(settings_file), _read(map_file)
    special = _special_tokens(settings, settings_file)
    # As transformers does: newer files list every token, and what stands in the older file does not count then.
    if "added_tokens_decoder" not in (settings or {}):
        special |= _special_tokens(token_map, map_file)
    fields = {file: {} if family in BORROWED_IDS else _read(file) or {} for file in files}
    fields |= {file: tree["config"] for file, tree in fields.items() if isinstance(tree.get("config"), dict)}
    template = _template_of_files(folder, settings or {}, settings_file)
    eos = _id_of(special, "eos_token", tokenizer)
    stops = [*_ids(eos), *(i for file in files for i in _token_ids(fields[file], "eos_token_id", file))]
    bos = _id_of(special, "bos_token", tokenizer)
    first = tokenizer.first_tokens
    if settings is None:
        named = (i for name in BEGIN_NAMES for i in _ids(tokenizer.special_token(name)))
        listed = (i for file in files for i in _token_ids(fields[file], "bos_token_id", file))
        known = (i for i in listed if tokenizer.token_text(i) is not None)
        bos = next((i for found in (_ids(bos), named, known) for i in found), None)
        first = first or (_ids(bos) or (tokenizer.end_of_document,))
    elif not first and settings.get("add_bos_token", family in BEGIN_ALWAYS):
        if bos is None and settings.get("add_bos_token"):
            got = special.get("bos_token")
            raise ConfigError(f"{settings_file}: bos_token: got {got!r}, allowed: a token, because of add_bos_token")
        first = _ids(bos)
    _require_words(first, vocab_size, folder / TOKENIZER_FILE)
    return _conventions(tokenizer, vocab_size, first, bos, eos, stops, template, special)


def _of_gguf(path: Path, tokenizer: Tokenizer, vocab_size: int) -> TextConventions:
    metadata, _ = open_gguf(path)
    # llama.cpp's own defaults.
    ids = {"bos": 1, "eos": 2, "unknown": 0} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        field_name = f"tokenizer.ggml.{name}_token_id"
        for number in _token_ids(metadata, field_name, path):
            ids[name] = number
            if tokenizer.token_text(number) is None:
                allowed = f"below {tokenizer.vocab_size}, the number of tokens"
                raise ConfigError(f"{path}: {field_name}: got {number}, allowed: {allowed}")
    template = _template(metadata.get("tokenizer.chat_template"), path, "tokenizer.chat_template")
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    texts = {theirs: tokenizer.token_text(ids[name]) for name, theirs in names.items() if name in ids}
    special = {name: text for name, text in texts.items() if text is not None}
    bos, stops = ids.get("bos"), [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    _require_words(tokenizer.first_tokens, vocab_size, path)
    return _conventions(tokenizer, vocab_size, tokenizer.first_tokens, bos, ids.get("eos"), stops, template, special)


def _conventions(
    tokenizer: Tokenizer,
    vocab_size: int,
    first: tuple[int, ...],
    bos: int | None,
    eos: int | None,
    stops: Sequence[int],
    template: str | None,
    special: Mapping[str, str],
) -> TextConventions:
    """Adds to the tokens that end an answer the end of a document, and what ends a turn of this chat template."""
    turns = (tokenizer.special_token(name) for name in END_OF_TURN_NAMES if template and name in template)
    ends = {*stops, tokenizer.end_of_document, *(i for i in turns if i is not None)}
    known = (i for i in (bos, eos, tokenizer.end_of_document) if i is not None)
    prefix = next((i for i in known if i < vocab_size), tokenizer.end_of_document)
    return TextConventions(
        first_tokens=first,
        prefix_token=prefix,
        stop_tokens=tuple(sorted(i for i in ends if i < vocab_size)),
        chat_template=template,
        special_tokens=special,
    )


def _require_words(first: Sequence[int], vocab_size: int, file: Any) -> None:
    if first and max(first) >= vocab_size:
        allowed = f"below the model's vocabulary, {vocab_size}"
        raise ConfigError(f"{file}: the beginning of a text: got token {max(first)}, allowed: {allowed}")


def _ids(number: int | None) -> tuple[int, ...]:
    return () if number is None else (number,)


def _id_of(special: Mapping[str, str], name: str, tokenizer: Tokenizer) -> int | None:
    return tokenizer.token_id(special[name]) if name in special else None


def _read(file: Any) -> dict[str, Any] | None:
    """The fields of a JSON file; None if there is no such file."""
    return read_json(file) if file.is_file() else None


def _special_tokens(fields: Mapping[str, Any] | None, file: Any) -> dict[str, str]:
    """The texts of fields such as `bos_token`, each a text or an object with its `content`."""
    special = {}
    for name, value in (fields or {}).items():
        # add_bos_token and others are settings.
        if not name.endswith("_token") or value is None or isinstance(value, bool):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ConfigError(f"{file}: {name}: got {value!r}, allowed: a text, or an object with a text `content`")
        special[name] = text
    return special


def _token_ids(fields: Mapping[str, Any], name: str, file: Any) -> list[int]:
    """The value of a field that is one id or a list of ids; none if it is null or missing."""
    value = fields.get(name)
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigError(f"{file}: {name}: got {value!r}, allowed: an integer >= 0, or a list of them")
    return numbers


def _template_of_files(folder: Any, settings: Mapping[str, Any], settings_file: Any) -> str | None:
    """Of chat_template.jinja, tokenizer_config.json and chat_template.json the first that has one."""
    file, older = folder / "chat_template.jinja", folder / "chat_template.json"
    try:
        return file.read_bytes().decode() or None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8") from None
    if settings.get("chat_template") is not None:
        return _template(settings["chat_template"], settings_file, "chat_template")
    return _template((_read(older) or {}).get("chat_template"), older, "chat_template")


def _template(value: Any, file: Any, field_name: str) -> str | None:
    """A template, or that with the name "default" of a list."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{file}: {field_name}: got {type(value).__name__}, allowed: a text, or a list of templates")
    return value or None
