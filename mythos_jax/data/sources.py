"""Where text comes from: files, folders, JSONL, Parquet, and the standard library of the running Python.

A source is the path of

- a `.jsonl` file: one JSON object per line, with a document in its `text` field;
- a `.parquet` file: one document per row, in the `text` column;
- any other file: one document, UTF-8;
- a folder: every file below it with one of `SUFFIXES`, in sorted order, except hidden files and folders;

or the word `stdlib`. Documents are streamed, and long ones are split into pieces, so a corpus may exceed memory.
"""

import json
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mythos_jax.errors import ConfigError, one_line

STDLIB = "stdlib"
RECORD_SUFFIXES = (".jsonl", ".parquet")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".yaml", ".yml", ".toml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
)
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
PIECE_CHARACTERS = 1 << 20  # a longer text file is read, and tokenized, in pieces of about this size

# Folders of the standard library that are not read: tests, installed packages, and two packages that consist mostly of
# generated tables (code pages, help texts), which would make the loss look better than it is.
_STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class InputFile:
    """A file to read. `name` is relative to its source, and so the same on every machine."""

    path: Path
    name: str
    size: int  # bytes


@dataclass(frozen=True)
class Piece:
    """A document, or one part of a long one."""

    name: str  # of the document
    text: str
    begins: bool = True  # whether the document starts here


def find_inputs(sources: Sequence[str]) -> tuple[list[InputFile], int]:
    """The files behind `sources`, in reading order, and the number of standard library files that are not UTF-8.

    Raises ConfigError: a source that does not exist, or a folder without readable files.
    """
    inputs: list[InputFile] = []
    skipped = 0
    for source in sources:
        path = Path(source)
        if source == STDLIB:
            library, skipped = _standard_library()
            inputs += library
        elif path.is_dir():
            files = list(_walk(path, SUFFIXES))
            if not files:
                raise ConfigError(f"source {source}: nothing to read in this folder; allowed: {' '.join(SUFFIXES)}")
            inputs += files
        elif path.is_file():
            inputs.append(InputFile(path, path.name, path.stat().st_size))
        else:
            raise ConfigError(f"source {source}: no such file; allowed: files, folders, {STDLIB}")
    return inputs, skipped


def read_pieces(inputs: Sequence[InputFile]) -> Iterator[Piece]:
    """Streams the documents of `inputs`, without empty ones.

    Raises ConfigError, naming the file and, for records, the line or row: unreadable, not UTF-8, not JSONL or Parquet,
    no `text` column.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for file in inputs:
        reader = readers.get(file.path.suffix.lower(), _read_text)
        try:
            yield from reader(file)
        except OSError as error:
            raise ConfigError(f"source {file.path}: cannot be read ({error.strerror or error})") from None


def truncate_piece(piece: Piece, max_bytes: int) -> Piece:
    """The first `max_bytes` UTF-8 bytes of a piece, without a character that would be cut in two."""
    return Piece(piece.name, piece.text.encode()[:max_bytes].decode(errors="ignore"), piece.begins)


def _walk(folder: Path, suffixes: Sequence[str], excluded: Collection[str] = ()) -> Iterator[InputFile]:
    for parent, subfolders, names in os.walk(folder, onerror=_raise_unreadable):
        # Assigned in place: os.walk descends into what is left of this list, in its order.
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith((".", "__pycache__")) and name not in excluded
        )
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in suffixes and not name.startswith(".") and path.is_file():
                yield InputFile(path, path.relative_to(folder).as_posix(), path.stat().st_size)


def _raise_unreadable(error: OSError) -> None:
    raise ConfigError(f"source {error.filename}: cannot be read ({error.strerror})") from None


def _standard_library() -> tuple[list[InputFile], int]:
    """The source files of the standard library, and the number of them that are not UTF-8."""
    folder = Path(sysconfig.get_path("stdlib"))
    readable: list[InputFile] = []
    skipped = 0
    for file in _walk(folder, (".py",), _STDLIB_EXCLUDED):
        if file.name.startswith("_sysconfigdata"):  # contains paths of the machine that built this Python
            continue
        try:
            file.path.read_bytes().decode()
            readable.append(file)
        except (OSError, UnicodeDecodeError):
            skipped += 1
    if not readable:
        raise ConfigError(f"source {STDLIB}: this Python has no source files in {folder}; allowed: files, folders")
    return readable, skipped


def _read_text(file: InputFile) -> Iterator[Piece]:
    try:
        with open(file.path, encoding="utf-8", newline="") as stream:  # newline="": keep line ends as they are
            begins = True
            while text := stream.read(PIECE_CHARACTERS):
                if len(text) == PIECE_CHARACTERS:
                    text += stream.readline(PIECE_CHARACTERS)  # so that pieces end with a line
                if "\0" in text:
                    raise ConfigError(f"source {file.path}: not a text file (it contains zero bytes)")
                yield Piece(file.name, text, begins)
                begins = False
    except UnicodeDecodeError:
        raise ConfigError(f"source {file.path}: not a text file (it is not UTF-8)") from None


def _read_jsonl(file: InputFile) -> Iterator[Piece]:
    with open(file.path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            location = f"source {file.path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise ConfigError(f"{location}: not UTF-8") from None
            except ValueError:
                raise ConfigError(f"{location}: not JSON") from None
            if not isinstance(record, dict) or "text" not in record:
                raise ConfigError(f'{location}: no text column; allowed: {{"text": "…"}}')
            yield from _document(record["text"], f"{file.name}:{number}", location)


def _read_parquet(file: InputFile) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            columns = table.schema_arrow.names
            if "text" not in columns:
                raise ConfigError(f"source {file.path}: no text column; it has {', '.join(columns) or 'none'}")
            for batch in table.iter_batches(batch_size=256, columns=["text"]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from _document(value, f"{file.name}:{number}", f"source {file.path}, row {number}")
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"source {file.path}: not a Parquet file ({one_line(error)})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"source {file.path}, near row {number + 1}: not UTF-8") from None


def _document(text: object, name: str, location: str) -> Iterator[Piece]:
    """The document in the `text` of a record; none if it is empty or missing."""
    if text is None:
        return
    if not isinstance(text, str):
        raise ConfigError(f"{location}: text has type {type(text).__name__}, allowed: a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{location}: text is not valid Unicode (half of a surrogate pair)") from None
    if text:
        yield Piece(name, text)
