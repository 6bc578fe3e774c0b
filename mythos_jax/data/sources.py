"""Where text comes from: files, folders, JSONL, Parquet, and the standard library of the running Python.

A source is the path of

- a `.jsonl` file: one JSON object a line, a document in its `text`;
- a `.parquet` file: a document in each row's `text`;
- any other file: one document, UTF-8;
- a folder: all that is in it and has one of `SUFFIXES`, subfolders too, hidden ones not, in sorted order;

or the word `stdlib`. Documents are streamed, long ones in pieces, so a corpus may be larger than memory.
"""

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mythos_jax.errors import ConfigError

STDLIB = "stdlib"
RECORD_SUFFIXES = (".jsonl", ".parquet")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".yaml", ".yml", ".toml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
)
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
PIECE = 1 << 20  # characters; a longer file is read, and tokenised, in pieces that end with a line

# Of the standard library: not its tests, nor what is installed beside it, nor the two packages that are mostly
# generated tables (code pages, help texts), which would flatter a loss.
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Input:
    """A file to read. `name` is the same on every machine: relative to the source it was found in."""

    path: Path
    name: str
    size: int  # bytes


@dataclass(frozen=True)
class Piece:
    """A document, or the next part of a long one; `name` is the document's."""

    name: str
    text: str
    begins: bool = True


def find_inputs(sources: Sequence[str]) -> tuple[list[Input], int]:
    """The files behind `sources`, in reading order, and the number of standard library files that are not UTF-8.

    Raises ConfigError: a source that does not exist, or a folder with nothing to read in it.
    """
    inputs, skipped = [], 0
    for source in sources:
        if source == STDLIB:
            library, skipped = _standard_library()
            inputs += library
        elif Path(source).is_dir():
            found = list(_walk(Path(source), SUFFIXES))
            if not found:
                raise ConfigError(f"source {source}: nothing to read in this folder; allowed: {' '.join(SUFFIXES)}")
            inputs += found
        elif Path(source).is_file():
            inputs.append(Input(Path(source), Path(source).name, Path(source).stat().st_size))
        else:
            raise ConfigError(f"source {source}: no such file; allowed: files, folders, {STDLIB}")
    return inputs, skipped


def pieces(inputs: Sequence[Input]) -> Iterator[Piece]:
    """Streams the documents of `inputs`, empty ones left out.

    Raises ConfigError, naming the file and where there is one the line: cannot be read, not UTF-8 text, not JSONL or
    Parquet, no `text` column.
    """
    for item in inputs:
        read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(item.path.suffix.lower(), _read_text)
        try:
            yield from read(item)
        except OSError as error:
            raise ConfigError(f"source {item.path}: cannot be read ({error.strerror or error})") from None


def cut_piece(piece: Piece, most: int) -> Piece:
    """The first `most` UTF-8 bytes of a piece, less what would cut a character."""
    return Piece(piece.name, piece.text.encode()[:most].decode(errors="ignore"), piece.begins)


def _walk(folder: Path, suffixes: Sequence[str], left_out: set[str] = frozenset()) -> Iterator[Input]:
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        # In place: this is how os.walk is told where to go, and in which order.
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__pycache__")) and f not in left_out)
        for file in sorted(files):
            path = Path(parent, file)
            if path.suffix.lower() in suffixes and not file.startswith(".") and path.is_file():
                yield Input(path, path.relative_to(folder).as_posix(), path.stat().st_size)


def _unreadable(error: OSError) -> None:
    raise ConfigError(f"source {error.filename}: cannot be read ({error.strerror})") from None


def _standard_library() -> tuple[list[Input], int]:
    folder = Path(sysconfig.get_path("stdlib"))
    kept, skipped = [], 0
    for item in _walk(folder, (".py",), _STDLIB_LEFT_OUT):
        if item.name.startswith("_sysconfigdata"):  # the paths of the machine that built this Python
            continue
        try:
            item.path.read_bytes().decode()
            kept.append(item)
        except (OSError, UnicodeDecodeError):
            skipped += 1
    if not kept:
        raise ConfigError(f"source {STDLIB}: this Python has no source files in {folder}; allowed: files, folders")
    return kept, skipped


def _read_text(item: Input) -> Iterator[Piece]:
    try:
        with open(item.path, encoding="utf-8", newline="") as file:  # newline="": line ends stay as they are
            begins = True
            while text := file.read(PIECE):
                if len(text) == PIECE:
                    text += file.readline(PIECE)
                if "\0" in text:
                    raise ConfigError(f"source {item.path}: not a text file (it holds zero bytes)")
                yield Piece(item.name, text, begins)
                begins = False
    except UnicodeDecodeError:
        raise ConfigError(f"source {item.path}: not a text file (it is not UTF-8)") from None


def _read_jsonl(item: Input) -> Iterator[Piece]:
    with open(item.path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"source {item.path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise ConfigError(f"{where}: not UTF-8") from None
            except ValueError:
                raise ConfigError(f"{where}: not JSON") from None
            if not isinstance(record, dict) or "text" not in record:
                raise ConfigError(f'{where}: no text column; allowed: {{"text": "…"}}')
            yield from _document(record["text"], f"{item.name}:{number}", where)


def _read_parquet(item: Input) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(item.path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise ConfigError(f"source {item.path}: no text column; it has {', '.join(columns) or 'none'}")
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from _document(value, f"{item.name}:{number}", f"source {item.path}, row {number}")
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"source {item.path}: not a Parquet file ({' '.join(str(error).split())})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"source {item.path}, near row {number + 1}: not UTF-8") from None


def _document(text: object, name: str, where: str) -> Iterator[Piece]:
    if text is None:  # a missing value is an empty document
        return
    if not isinstance(text, str):
        raise ConfigError(f"{where}: text is a {type(text).__name__}, allowed: a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: text is not Unicode (half of a surrogate pair)") from None
    if text:
        yield Piece(name, text)
