"""Reads documents from files: text, JSONL, JSON, CSV and Parquet.

- `.jsonl` and `.ndjson`: one JSON object per line, with a document in its text column (the field `text`, or another);
- `.json`: an array of such objects or of texts, or one object; or lines of JSON as in `.jsonl`;
- `.csv` and `.tsv`: one document per row, in the text column; the first row names the columns;
- `.parquet`: one document per row, in the text column;
- anything else: one document, UTF-8.

Where conversations are read, every record is one (chat_record.py), and a file of text is refused.

Documents are streamed (a `.json` array is read whole), and long texts are split into pieces, so a corpus may exceed
memory.
"""

import csv
import hashlib
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mythos_jax.data.chat_record import COLUMNS, RecordError, canonical, parse_record
from mythos_jax.data.compressed import DAMAGED, open_bytes, open_text
from mythos_jax.data.input_file import RECORD_SUFFIXES, SUFFIXES, InputFile
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.json_text import parse_json

JOIN = "\n\n"  # between the texts of several columns
PIECE_CHARACTERS = 1 << 20  # a longer text file is read, and tokenized, in pieces of about this size
SKIP_HINT = "`mythos data prepare --on-error skip` leaves it out"


@dataclass(frozen=True)
class Piece:
    """A document, or one part of a long one; or a conversation (see `chat_record.canonical`), which is never divided.

    location: where a conversation is, for errors; empty for text.
    """

    name: str  # of the document; for a conversation a hash of it
    text: str
    begins: bool = True  # whether the document starts here
    held_out: bool | None = None  # None: its name decides
    location: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A file or record that is not a document, or `count` of them. is_error: whether that is a mistake in the data."""

    text: str  # where, and why
    is_error: bool = True
    count: int = 1


@dataclass(frozen=True)
class Reading:
    """How documents are read. text_column: the name of the text of records; or several with commas, whose texts are
    joined. skip_errors: leave out what cannot be read, instead of refusing it. chat: records are conversations."""

    text_column: str = "text"
    skip_errors: bool = False
    chat: bool = False

    @cached_property
    def text_columns(self) -> list[str]:
        return self.text_column.split(",")

    def missing(self, columns: Container[str]) -> list[str]:
        """The columns of text that are not there."""
        return [name for name in self.text_columns if name not in columns]

    def wanted(self, columns: Sequence[str]) -> list[str]:
        """Those of a table's columns that are read; none if it lacks one that is needed."""
        if not self.chat:
            return [] if self.missing(columns) else self.text_columns
        is_chat = "messages" in columns or {"prompt", "completion"} <= set(columns)
        return [name for name in COLUMNS if name in columns] if is_chat else []


class _NotReadable(Exception):
    """A file that cannot be read, from here on. The message says why."""


def read_pieces(inputs: Sequence[InputFile], reading: Reading) -> Iterator[Piece | LeftOut]:
    """Streams the documents of `inputs`, without empty ones, and what is left out between them.

    Raises ConfigError, unless errors are skipped: it names the file and, for records, the line or row.
    """
    for file in inputs:
        documents = 0
        try:
            for item in _read(file, reading):
                if isinstance(item, LeftOut) and item.is_error and not reading.skip_errors:
                    raise ConfigError(f"{item.text}; {SKIP_HINT}")
                documents += isinstance(item, Piece) and item.begins
                yield item
        except (OSError, _NotReadable, *DAMAGED) as error:
            reason = str(error) if isinstance(error, _NotReadable) else _cannot_be_read(file, error)
            if not reading.skip_errors:
                raise ConfigError(f"{file}: {reason}; {SKIP_HINT}") from None
            kept = f"; its first {documents:,} documents are kept" if documents else ""
            yield LeftOut(f"{file}: {reason}{kept}")


def truncate_piece(piece: Piece, max_bytes: int) -> Piece:
    """The first `max_bytes` UTF-8 bytes of a piece, without a character that would be cut in two; nothing of a
    conversation that has more."""
    if piece.location:
        return piece if len(piece.text.encode()) <= max_bytes else replace(piece, text="")
    text = piece.text.encode()[:max_bytes].decode(errors="ignore")
    return Piece(piece.name, text, piece.begins, piece.held_out)


def _cannot_be_read(file: InputFile, error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or one_line(error)
    if file.compression and getattr(error, "errno", None) is None:
        return f"damaged, or not a {file.compression} file ({reason})"
    return f"cannot be read ({reason})"


def _read(file: InputFile, reading: Reading) -> Iterator[Piece | LeftOut]:
    match file.suffix:
        case ".jsonl" | ".ndjson":
            return _read_jsonl(file, reading)
        case ".json":
            return _read_json(file, reading)
        case ".csv" | ".tsv":
            return _read_csv(file, reading)
        case ".parquet":
            return _read_parquet(file, reading)
    if reading.chat:
        raise _NotReadable(f"not a file of records; allowed: {' '.join(RECORD_SUFFIXES)}")
    return _read_text(file, reading)


def _read_text(file: InputFile, reading: Reading) -> Iterator[Piece]:
    if reading.skip_errors:  # a file is left out as a whole, so all of it is read before its first piece is used
        for _ in _text_pieces(file):
            pass
    yield from _text_pieces(file)


def _text_pieces(file: InputFile) -> Iterator[Piece]:
    begins = True
    try:
        with open_text(file) as stream:
            while text := stream.read(PIECE_CHARACTERS):
                if len(text) == PIECE_CHARACTERS:
                    text += stream.readline(PIECE_CHARACTERS)  # so that pieces end with a line
                if "\0" in text:
                    raise _NotReadable("not a text file (it contains zero bytes)")
                if begins and file.suffix not in SUFFIXES and _JSON_START.match(text):
                    raise _NotReadable("looks like JSON; allowed: the name .json or .jsonl, or .txt to read it as text")
                yield Piece(file.name, text, begins)
                begins = False
    except UnicodeDecodeError as error:
        utf16 = begins and error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise _NotReadable(f"not a text file (it is {'UTF-16, ' * utf16}not UTF-8)") from None


# The start of a JSON object, or of an array of objects or texts.
_STRING = r'"(?:[^"\\\n]|\\.)*"'
_JSON_START = re.compile(rf"\s*(?:\[\s*)?\{{\s*{_STRING}\s*:|\s*\[\s*{_STRING}\s*[,\]]")


def _read_jsonl(file: InputFile, reading: Reading) -> Iterator[Piece | LeftOut]:
    with open_bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            location = f"{file}, line {number}"
            try:
                record = parse_json(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield LeftOut(f"{location}: not UTF-8")
            except ValueError as error:
                yield LeftOut(f"{location}: {_not_json(error)}")
            else:
                yield from _document(record, f"{file.name}:{number}", location, reading)


def _read_json(file: InputFile, reading: Reading) -> Iterator[Piece | LeftOut]:
    if _has_json_lines(file):
        yield from _read_jsonl(file, reading)
        return
    with open_bytes(file) as stream:
        content = stream.read()
    if not content.strip():
        return
    try:
        tree = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _NotReadable("not UTF-8") from None
    except ValueError as error:
        raise _NotReadable(_not_json(error)) from None
    records = tree if isinstance(tree, list) else [tree]
    is_text = bool(records) and isinstance(records[0], str) and not reading.chat
    if records and not file.given and not is_text and _missing(records[0], reading):
        yield LeftOut(f"{file}: {_missing(records[0], reading)}", is_error=False)  # such as package.json
        return
    for number, record in enumerate(records, start=1):
        is_text = isinstance(record, str) and not reading.chat and len(reading.text_columns) == 1
        value = {reading.text_column: record} if is_text else record
        yield from _document(value, f"{file.name}:{number}", f"{file}, record {number}", reading)


def _has_json_lines(file: InputFile) -> bool:
    """Whether the first line with something on it is complete JSON, and is not the only one."""
    with open_bytes(file) as stream:
        first = next((line for line in stream if line.strip()), b"")
        if not any(line.strip() for line in stream):
            return False
    try:
        parse_json(first.decode("utf-8-sig"))
    except ValueError:
        return False
    return True


def _not_json(error: ValueError) -> str:
    return "not JSON" + (" that can be read (nested too deeply)" if "nested" in str(error) else "")


def _read_csv(file: InputFile, reading: Reading) -> Iterator[Piece | LeftOut]:
    csv.field_size_limit(2**31 - 1)  # of the whole process: a document may be long
    delimiter = "\t" if file.suffix == ".tsv" else ","
    number = 0
    try:
        with open_text(file) as stream:
            # Strict: text with a stray quotation mark is refused, not merged with the rows that follow.
            rows = csv.reader(stream, delimiter=delimiter, strict=True)
            columns = next((row for row in rows if row), [])
            if not (wanted := reading.wanted(columns)):
                if columns:
                    problem = _no_column(columns, reading)
                    yield LeftOut(f"{file}: {problem}", is_error=file.given)
                return
            for row in rows:
                if not row:
                    continue
                number, location = number + 1, f"{file}, line {rows.line_num}"
                if len(row) != len(columns):
                    yield LeftOut(f"{location}: has {len(row)} columns, the first row has {len(columns)}")
                    continue
                record = {name: row[columns.index(name)] for name in wanted}
                if any("\0" in text for text in record.values()):
                    yield LeftOut(f"{location}: contains zero bytes")
                    continue
                yield from _document(record, f"{file.name}:{number}", location, reading)
    except UnicodeDecodeError:
        raise _NotReadable("not UTF-8") from None
    except csv.Error as error:
        raise _NotReadable(f"not CSV after row {number} ({one_line(error)})") from None


def _read_parquet(file: InputFile, reading: Reading) -> Iterator[Piece | LeftOut]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # An open file, because pyarrow takes no path that is not UTF-8.
        with open_bytes(file) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            columns = table.schema_arrow.names
            if not (wanted := reading.wanted(columns)):
                raise _NotReadable(_no_column(columns, reading))
            for batch in _batches(table, wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield from _document(record, f"{file.name}:{number}", f"{file}, row {number}", reading)
    except pyarrow.ArrowException as error:
        raise _NotReadable(f"not a Parquet file ({one_line(error, limit=200)})") from None
    except UnicodeDecodeError:
        raise _NotReadable(f"not UTF-8 near row {number + 1}") from None
    except (ValueError, OverflowError) as error:  # such as a time that Python cannot hold
        raise _NotReadable(f"cannot be read near row {number + 1} ({one_line(error, limit=200)})") from None


def _batches(table: Any, columns: list[str]) -> Iterator[Any]:
    """The rows of a Parquet file. Row group by row group: a reader keeps in memory what it has read until its end."""
    for group in range(table.num_row_groups):
        yield from table.iter_batches(batch_size=256, columns=columns, row_groups=[group])


def _document(record: Any, name: str, location: str, reading: Reading) -> Iterator[Piece | LeftOut]:
    """The document in the text columns of a record, nothing if they are empty or null; or the conversation that it
    is."""
    if reading.chat:
        yield _conversation(record, location)
        return
    if problem := _missing(record, reading):
        yield LeftOut(f"{location}: {problem}")
        return
    texts = []
    for column in reading.text_columns:
        text = record[column]
        if text is None:
            continue
        if not isinstance(text, str):
            yield LeftOut(f"{location}: {one_line_name(column)} has type {type(text).__name__}, allowed: a string")
            return
        try:
            text.encode()
        except UnicodeEncodeError:
            yield LeftOut(f"{location}: text is not valid Unicode (half of a surrogate pair)")
            return
        if text:
            texts.append(text)
    if texts:
        yield Piece(name, JOIN.join(texts))


def _conversation(record: Any, location: str) -> Piece | LeftOut:
    try:
        text = canonical(parse_record(record))
    except RecordError as error:
        return LeftOut(f"{location}: {error}")
    except RecursionError:
        return LeftOut(f"{location}: nested too deeply")
    return Piece(hashlib.sha256(text.encode()).hexdigest(), text, location=location)


def one_line_name(name: str, limit: int = 60) -> str:
    """The name of a column as it can be shown."""
    return ascii(name)[1:-1][:limit] if not name.isprintable() else name[:limit]


def _missing(record: Any, reading: Reading) -> str:
    """Why a record has no text column, or is no conversation; empty if it has one, or is one."""
    if reading.chat:
        return "" if isinstance(record, dict) and reading.wanted(list(record)) else _no_column(record, reading)
    if not isinstance(record, dict):
        names = ", ".join(f'"{one_line_name(name)}": "…"' for name in reading.text_columns)
        return f"no {one_line_name(reading.text_columns[0])} column; allowed: {{{names}}}"
    return _no_column(list(record), reading) if reading.missing(record) else ""


def _no_column(columns: Any, reading: Reading) -> str:
    """columns: those that there are; or what is there in place of an object."""
    columns = [name for name in columns if isinstance(name, str)] if isinstance(columns, list | dict) else []
    shown = ", ".join(map(one_line_name, columns[:10])) + (", …" if len(columns) > 10 else "")
    if reading.chat:
        return f"no messages, and not both prompt and completion; it has {shown or 'none'}"
    has = f"it has {shown or 'none'}" + (" (--text-column or data.text_column names one)" if columns else "")
    return f"no {' and no '.join(map(one_line_name, reading.missing(columns)))} column; {has}"
