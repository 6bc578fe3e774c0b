"""The description of a prepared folder: `manifest.json`."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_jax.data.shards import shard_name
from mythos_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.json_text import parse_json
from mythos_jax.paths import write_whole

MANIFEST_FILE = "manifest.json"
ROWS_AT_FILE = "rows_at"  # in a folder whose rows are elsewhere: where
VERSION = 2  # 1: each split is one compressed file, of rows without checks (up to 0.2.0's development)
SPLITS = ("train", "held_out")

# Fields that record how the folder was requested, not what it contains.
_REQUEST_FIELDS = {
    *("sources", "held_out_fraction", "max_bytes", "text_column", "skipped", "inputs", "files", "times"),
    *("tokenizer", "left_out", "left_out_count"),
}
_FILE_KEYS = {"held_out_fraction": "held_out"}  # fields whose key in manifest.json is another word


@dataclass(frozen=True)
class Shard:
    """One of the files of a split (shards.py). The field names are keys in manifest.json."""

    rows: int
    content: str  # sha256 of the padded rows, the key of their checks
    file_bytes: int
    sha256: str  # of the file


@dataclass(frozen=True)
class Split:
    """The rows of a split. The field names are keys in manifest.json."""

    documents: int  # or conversations
    text_bytes: int  # UTF-8 bytes of the documents: the denominator of bits per byte
    tokens: int  # targets: every token of every document, and its end; of conversations, those trained on
    rows: int
    content: str  # sha256 of the rows' tokens, independent of the files that they are in
    file_bytes: int  # of all files
    sha256: str  # of the list of shards; in version 1 of the file
    row_bytes: int = 0  # of the longest row
    shards: tuple[Shard, ...] = ()  # with the same number of rows, but the last may have fewer; none in version 1


_FILE_FIELDS = ("file_bytes", "sha256", "row_bytes", "shards")  # that say how the rows are stored, not what they are


@dataclass(frozen=True)
class ChatSplit:
    """What the rows of conversations of one split hold. The field names are keys in manifest.json."""

    samples: int  # conversations, parts of those that are too long, and answers that have a text of their own
    answers: int  # trained on
    trained: int  # targets with a weight
    masked: int  # targets without: prompts, headers, the first token of a sample
    padding: int  # at the ends of rows
    cut: int  # conversations that are cut at turns
    by_answer: int  # conversations whose template needs a text of its own for each answer
    truncated: int  # samples whose end is cut off
    dropped: int  # tokens that this takes
    without_answer: int  # samples that are left out, because a row has no room for an answer in them
    unended: int  # answers without a token that ends them
    joined: int  # texts whose continuation begins inside a token
    unwritten_tools: int  # conversations with tools that the template does not write


# What is counted while conversations are tokenized: of each, and of each sample. The rest, when rows are written.
CONVERSATION_COUNTS = ("cut", "by_answer", "joined", "unwritten_tools")
COUNTS = ("answers", "unended", "truncated", "dropped", *CONVERSATION_COUNTS)


@dataclass(frozen=True)
class Chats:
    """How conversations are written. template: hash of the chat template and of the tokens that it may write."""

    template: str
    splits: dict[str, ChatSplit] = field(default_factory=dict)  # "train" and "held_out"


@dataclass(frozen=True)
class Manifest:
    """A prepared folder. The field names are keys in manifest.json, except those in `_FILE_KEYS`."""

    seq_len: int
    dtype: str  # of a stored token, in NumPy's notation: "<u2" or "<u4"
    tokenizer: str  # "bytes", or the original name of tokenizer.json
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_document: int
    splits: dict[str, Split]  # "train" and "held_out"
    # How the folder was requested.
    sources: tuple[str, ...]
    held_out_fraction: float  # of the documents
    max_bytes: int
    skipped: int = 0  # standard library files that are not UTF-8
    inputs: str = ""  # hash of the input files' paths, sizes and times; if unchanged, there is nothing to do
    # The same of their names and sizes, and of their names, sizes and times. 0.1.0 did not store these.
    files: str = ""
    times: str = ""
    text_column: str = "text"  # of records
    left_out: tuple[str, ...] = ()  # what folders have that is not read; of what could not be read the first thousand
    left_out_count: int = 0  # of files and records that could not be read
    chat: Chats | None = None  # of rows of conversations; manifests of text have no such key
    version: int = VERSION

    @property
    def in_bytes(self) -> bool:
        """Whether the tokens are bytes, so that there is no tokenizer.json."""
        return self.tokenizer_fingerprint == ByteTokenizer.fingerprint

    @property
    def fingerprint(self) -> str:
        """Identifies the rows, independently of their sources, their creation time and the files that they are in."""
        content = {name: value for name, value in self._fields().items() if name not in _REQUEST_FIELDS}
        content["version"] = 1  # the same rows are the same data in every version
        content["splits"] = {
            name: {key: value for key, value in split.items() if key not in _FILE_FIELDS}
            for name, split in content["splits"].items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def row_files(self, split: str) -> dict[str, int]:
        """The names of the files of a split, and their sizes."""
        return {name: file.file_bytes for name, file in self._files(split).items()}

    def row_checksums(self, split: str) -> dict[str, str]:
        """The names of the files of a split, and the sha256 of each."""
        return {name: file.sha256 for name, file in self._files(split).items()}

    def _files(self, split: str) -> dict[str, Shard | Split]:
        found = self.splits[split]
        if self.version == 1:
            return {f"{split}.array_record": found}
        return {shard_name(split, i, len(found.shards)): shard for i, shard in enumerate(found.shards)}

    def load_tokenizer(self, folder: str | Path) -> Tokenizer:
        """The tokenizer in the folder that this describes."""
        return ByteTokenizer() if self.in_bytes else load_saved_tokenizer(folder, self.end_of_document)

    def _fields(self) -> dict[str, Any]:
        tree = dataclasses.asdict(self)
        if self.chat is None:
            del tree["chat"]
        return tree

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        fields = {_FILE_KEYS.get(name, name): value for name, value in self._fields().items()}
        fields["fingerprint"] = self.fingerprint
        return (json.dumps(fields, indent=2) + "\n").encode()

    def save(self, folder: str | Path) -> None:
        """Writes manifest.json into `folder`, in one step."""
        write_whole(Path(folder) / MANIFEST_FILE, self.to_json())


def load_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of a prepared folder and checks that its files exist and have the recorded sizes.

    Of a folder whose rows are elsewhere, `local_folder` has compared the files.
    Raises ConfigError: not a prepared folder, a changed manifest, a missing or truncated file.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).is_file():
        problem = f"has no {MANIFEST_FILE}" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {problem}; allowed: a folder made by `mythos data prepare`")
    manifest = parse_manifest((folder / MANIFEST_FILE).read_bytes, folder / MANIFEST_FILE)
    if not (folder / ROWS_AT_FILE).exists():
        with os.scandir(folder) as entries:
            check_files(manifest, folder, {entry.name: entry.stat().st_size for entry in entries if entry.is_file()})
    if not manifest.in_bytes and not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError(f"{folder / TOKENIZER_FILE}: missing; prepare the folder again")
    return manifest


def check_files(manifest: Manifest, folder: str | Path, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError if a file of rows is not in `folder`, whose files have these sizes, or has another size."""
    for split in manifest.splits:
        for name, file_bytes in manifest.row_files(split).items():
            if name not in sizes:
                raise ConfigError(f"{folder}/{name}: missing; prepare the folder again")
            if sizes[name] != file_bytes:
                raise ConfigError(
                    f"{folder}/{name}: got {sizes[name]} bytes, the manifest says {file_bytes}; prepare it again"
                )


def parse_manifest(read: Callable[[], bytes], path: str | Path) -> Manifest:
    """A manifest.json whose content matches its fingerprint. path: for messages. Raises ConfigError."""
    manifest = None
    try:
        fields = parse_json(read())
        version, fingerprint = fields["version"], fields.pop("fingerprint")
        fields |= {name: fields.pop(key) for name, key in _FILE_KEYS.items() if key in fields}
        if version in range(1, VERSION + 1):  # the fields of other versions are unknown
            splits = {name: _split(fields["splits"][name]) for name in SPLITS}
            lists = {name: tuple(fields.get(name, ())) for name in ("sources", "left_out")}
            manifest = Manifest(**fields | {"splits": splits} | lists | {"chat": _chats(fields.get("chat"))})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(f"{path}: not a manifest of prepared data; prepare the folder again") from None
    if manifest is None:
        raise ConfigError(f"{path}: got version {version}, allowed: 1 to {VERSION}; prepare the folder again")
    changed = any(split.sha256 != shards_sha256(split.shards) for split in manifest.splits.values() if version > 1)
    if changed or manifest.fingerprint != fingerprint:
        raise ConfigError(f"{path}: has changed since it was written; prepare the folder again")
    return manifest


def load_saved_tokenizer(folder: str | Path, end_of_document: int) -> Tokenizer:
    """The tokenizer in a folder, whose end of document may have a name that has to be given."""
    from tokenizers import Tokenizer as Backend

    return load_tokenizer(folder, Backend.from_file(str(Path(folder) / TOKENIZER_FILE)).id_to_token(end_of_document))


def _split(tree: dict[str, Any]) -> Split:
    return Split(**tree | {"shards": tuple(Shard(**shard) for shard in tree.get("shards", ()))})


def _chats(tree: dict[str, Any] | None) -> Chats | None:
    if tree is None:
        return None
    return Chats(**tree | {"splits": {name: ChatSplit(**tree["splits"][name]) for name in SPLITS}})


def check_sums(manifest: Manifest, folder: str | Path, origin: str | Path | None = None) -> None:
    """Raises ConfigError if a file of rows in `folder` has another sha256 than the manifest says; reads all of them.
    origin: what the message calls the folder."""
    for split in manifest.splits:
        for name, sha256 in manifest.row_checksums(split).items():
            if file_sha256(Path(folder) / name) != sha256:
                place = f"{origin or folder}/{name}"
                raise ConfigError(
                    f"{place}: its checksum differs from the manifest's; prepare or copy the folder again"
                )


def shards_sha256(shards: Sequence[Shard]) -> str:
    """The sha256 of a list of shards."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(shard) for shard in shards]).encode()).hexdigest()


def check_folder_name(folder: str | Path) -> None:
    """Raises ConfigError for a name that the library for rows cannot open."""
    try:
        os.path.abspath(folder).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{str(folder)!a}: the folder's name is not UTF-8; allowed: a name that is") from None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
