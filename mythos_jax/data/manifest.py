"""What a folder of prepared rows says about itself: `manifest.json`."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mythos_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer
from mythos_jax.errors import ConfigError

MANIFEST_FILE = "manifest.json"
VERSION = 1
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Split:
    """One file of rows."""

    documents: int
    text_bytes: int  # UTF-8 bytes of the documents: what bits per byte divide by
    tokens: int  # targets: each token of each document, and the end of each document
    rows: int
    content: str  # sha256 of the rows' tokens, whatever the file format makes of them
    file_bytes: int
    sha256: str  # of the file


@dataclass(frozen=True)
class Manifest:
    """A prepared folder: `splits` has "train" and "held_out"."""

    seq_len: int
    dtype: str  # of a stored token, numpy's word: "<u2" or "<u4"
    tokenizer: str  # "bytes", or the name of the file that tokenizer.json is a copy of
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_document: int
    splits: dict[str, Split]
    # How it was asked for.
    sources: tuple[str, ...]
    held_out_fraction: float  # of the documents
    max_bytes: int
    skipped: int = 0  # standard library files that are not UTF-8
    inputs: str = ""  # a hash of the files' names, sizes and times: while they are as they were, nothing is to be done
    version: int = VERSION

    @property
    def in_bytes(self) -> bool:
        """Whether the tokenizer is the byte tokenizer, which has no file."""
        return self.tokenizer_fingerprint == ByteTokenizer.fingerprint

    @property
    def fingerprint(self) -> str:
        """Names the data itself: neither where it came from, nor when, nor how the files are compressed."""
        about_the_request = {"sources", "held_out_fraction", "max_bytes", "skipped", "inputs", "tokenizer"}
        tree = {name: value for name, value in dataclasses.asdict(self).items() if name not in about_the_request}
        for split in tree["splits"].values():
            del split["file_bytes"], split["sha256"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes manifest.json into `folder`."""
        tree = dataclasses.asdict(self) | {"fingerprint": self.fingerprint}
        (Path(folder) / MANIFEST_FILE).write_text(json.dumps(tree, indent=2) + "\n")


def load_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of a prepared folder and looks whether its files are there, in the sizes it names.

    Raises ConfigError: no prepared folder, a changed manifest, a missing or truncated file.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        why = f"has no {MANIFEST_FILE}" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {why}; allowed: a folder made by `mythos data prepare`")
    try:
        tree = json.loads(path.read_text())
        version, fingerprint = tree["version"], tree.pop("fingerprint")
        if "held_out" in tree:  # what mythos_jax 0.1.0 called it
            tree["held_out_fraction"] = tree.pop("held_out")
        if version == VERSION:
            splits = {name: Split(**tree["splits"][name]) for name in SPLITS}
            manifest = Manifest(**tree | {"splits": splits, "sources": tuple(tree["sources"])})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(f"{path}: not a manifest of prepared data; prepare the folder again") from None
    if version != VERSION:
        raise ConfigError(f"{path}: got version {version}, allowed: {VERSION}; prepare the folder again")
    if manifest.fingerprint != fingerprint:
        raise ConfigError(f"{path}: has changed since it was written; prepare the folder again")
    for name, split in manifest.splits.items():
        file = rows_file(folder, name)
        if not file.is_file():
            raise ConfigError(f"{file}: missing; prepare the folder again")
        if (size := file.stat().st_size) != split.file_bytes:
            raise ConfigError(f"{file}: got {size} bytes, the manifest says {split.file_bytes}; prepare it again")
    if not manifest.in_bytes and not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError(f"{folder / TOKENIZER_FILE}: missing; prepare the folder again")
    return manifest


def verify(folder: str | Path) -> Manifest:
    """`load_manifest`, and also compares each file's sha256; reads everything. Raises ConfigError naming the file."""
    manifest = load_manifest(folder)
    for name, split in manifest.splits.items():
        file = rows_file(folder, name)
        if file_sha256(file) != split.sha256:
            raise ConfigError(f"{file}: its checksum is not the manifest's; prepare the folder again")
    return manifest


def rows_file(folder: str | Path, split: str) -> Path:
    """Where the rows of a split are."""
    return Path(folder) / f"{split}.array_record"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
