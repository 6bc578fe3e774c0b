"""What is read from files and folders, in which formats, and that nothing is left out without a word."""

import bz2
import csv
import gzip
import json
import lzma
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest

from mythos_jax.cli import main
from mythos_jax.data.input_file import COMPRESSIONS
from mythos_jax.data.prepare import prepare
from mythos_jax.data.readers import LeftOut, Piece, Reading, read_pieces
from mythos_jax.data.sources import find_inputs
from mythos_jax.errors import ConfigError
from tests.data.test_split import texts

TEXTS = ["one é", "two\nlines", 'three "quoted", with a comma\tand a tab', "  four "]


def records(column="text"):
    return [{"id": i, column: text} for i, text in enumerate(TEXTS)]


def as_csv(path, delimiter=",", column="text"):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", column], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records(column))


def as_parquet(path, column="text"):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records(column)), path)


def as_lines(path, column="text"):
    path.write_text("".join(json.dumps(record) + "\n" for record in records(column)))


# Each writes the documents of `TEXTS` to a path.
FORMATS = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "lines.json": as_lines,
    "array.json": lambda path, column="text": path.write_text(json.dumps(records(column), indent=1)),
    "one_line.json": lambda path, column="text": path.write_text(json.dumps(records(column))),
    "a.csv": as_csv,
    "a.tsv": lambda path, column="text": as_csv(path, "\t", column),
    "a.parquet": as_parquet,
}


def documents(*sources, **reading):
    pieces = list(read_pieces(find_inputs([str(source) for source in sources]).files, Reading(**reading)))
    assert all(isinstance(piece, Piece) for piece in pieces), pieces
    return [piece.text for piece in pieces]


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    FORMATS[name](tmp_path / name)
    assert documents(tmp_path / name) == documents(tmp_path) == TEXTS
    FORMATS[name](tmp_path / name, column="body")
    assert documents(tmp_path / name, text_column="body") == TEXTS
    with pytest.raises(ConfigError, match=r"no text column; it has id, body \(--text-column or data\.text_column"):
        documents(tmp_path / name)


def test_json_of_texts_and_of_one_object(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    (tmp_path / "one.json").write_text(json.dumps({"text": "alone", "more": [1]}, indent=2))
    (tmp_path / "empty.json").write_text("  \n")
    (tmp_path / "none.json").write_text("[]")
    assert documents(tmp_path) == ["alone", *TEXTS]


def compress(data, suffix):
    if suffix == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed(tmp_path, compression):
    for name in ["a.jsonl", "array.json", "a.csv"]:
        FORMATS[name](tmp_path / name)
    (tmp_path / "text.txt").write_text("\ufeffa text\r\n" * 3)
    for path in list(tmp_path.iterdir()):
        path.with_name(path.name + compression).write_bytes(compress(path.read_bytes(), compression))
        path.unlink()
    assert documents(tmp_path) == [*TEXTS, *TEXTS, *TEXTS, "a text\r\n" + "\ufeffa text\r\n" * 2]
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert documents(path)
        for damage in [content[: len(content) // 2], b"not compressed" * 9]:
            path.write_bytes(damage)
            with pytest.raises(
                ConfigError, match=rf"^source .*\{compression}: damaged, or not a \{compression} file \("
            ) as caught:
                documents(path)
            assert "\n" not in str(caught.value)
        path.write_bytes(content)


def test_a_folder_says_what_it_leaves_out(tmp_path):
    folder, elsewhere = tmp_path / "c", tmp_path / "elsewhere"
    for path in ["c/.git", "c/__pycache__", "c/sub", "elsewhere/deep"]:
        (tmp_path / path).mkdir(parents=True)
    names = [
        "a.txt",
        "sub/b.md",
        "x.pdf",
        "sub/y.PDF",
        "z.tar.gz",
        "README",
        ".hidden.txt",
        ".git/c.txt",
        "t.parquet.gz",
    ]
    for name in names:
        (folder / name).write_text(name)
    (elsewhere / "deep" / "linked.txt").write_text("linked")
    (elsewhere / "2.bin").write_text("x")
    (folder / "link").symlink_to("../elsewhere")
    (folder / "again").symlink_to("../elsewhere/deep")
    (folder / "sub" / "circle").symlink_to("..")
    (elsewhere / "deep" / "back").symlink_to(folder)
    (folder / "file_link.txt").symlink_to("a.txt")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    found = find_inputs([str(folder)])
    assert [file.name for file in found.files] == [
        *("a.txt", "file_link.txt", "sub/b.md"),
        "again/linked.txt",  # links to folders come last, and "link" leads to the same folder
    ]
    assert found.left_out == [
        f"source {folder}: left out 3 links to a folder that is read already, 2 .pdf, 2 hidden folders, 1 .bin, "
        "1 .parquet.gz, 1 .tar.gz, 1 broken link, 1 file without a suffix, 1 hidden file, 1 special file"
    ]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.docx").write_text("x")
    with pytest.raises(ConfigError, match=r"only: nothing to read in this folder \(it has 1 \.docx\); allowed: \.txt"):
        find_inputs([str(tmp_path / "only")])


def test_rows_in_the_folder_that_they_are_made_from(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    manifest = prepare([str(tmp_path)], tmp_path / "data" / "out", seq_len=8, held_out_fraction=0.4)
    assert prepare([str(tmp_path)], tmp_path / "data" / "out", seq_len=8, held_out_fraction=0.4) == manifest
    found = find_inputs([str(tmp_path)])
    assert [file.name for file in found.files] == ["a.txt", "b.txt", "c.txt"]
    assert found.left_out == [f"source {tmp_path}: left out 1 prepared folder"]


def test_json_and_csv_in_a_folder_that_hold_no_documents(tmp_path, capsys):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.js").write_text("let a")
    (folder / "b.js").write_text("let b")
    (folder / "package.json").write_text('{"name": "code"}')
    (folder / "numbers.json").write_text("[1, 2]")
    (folder / "table.csv").write_text("x,y\n1,2\n")
    manifest = prepare([str(folder)], tmp_path / "out", seq_len=8, held_out_fraction=0.5)
    assert manifest.left_out_count == 3
    assert [line.removeprefix(f"source {folder}/").split(";")[0] for line in manifest.left_out] == [
        "numbers.json: no text column",
        "package.json: no text column",
        "table.csv: no text column",
    ]
    printed = capsys.readouterr().err
    assert all(f"left out: {line}\n" in printed for line in manifest.left_out)
    for name in ["package.json", "table.csv"]:  # given as a file, it is meant
        with pytest.raises(ConfigError, match=rf"{name}.*: no text column; it has "):
            documents(folder / name)


@pytest.mark.parametrize(
    "text", ['{"text": "a"}\n{"text": "b"}\n', '[\n {"text": "a"}\n]', '["a", "b"]', '{\n  "text": "a"}']
)
def test_json_under_another_name_is_not_read_as_text(tmp_path, text):
    for name in ["data", "data.dat", "data.jsonl.bak", "data.gz"]:
        (tmp_path / name).write_bytes(compress(text.encode(), ".gz") if name == "data.gz" else text.encode())
        with pytest.raises(ConfigError, match=r"looks like JSON; allowed: the name \.json or \.jsonl, or \.txt"):
            documents(tmp_path / name)
    (tmp_path / "data.txt").write_text(text)
    assert documents(tmp_path / "data.txt") == [text]
    (tmp_path / "prose").write_text('[1] "A" is a letter.\n{not json}')
    assert documents(tmp_path / "prose") == ['[1] "A" is a letter.\n{not json}']


BAD = {
    "a.csv": ('text\n"a" b\n', r"a\.csv: not CSV after row 0 \(.*expected after"),
    "b.csv": ("id,text\n1\n", r"b\.csv, line 2: has 1 columns, the first row has 2"),
    "c.csv": ("id,text\n1,a,b\n", r"c\.csv, line 2: has 3 columns"),
    "d.csv": ('text\n"open\n', r"d\.csv: not CSV after row 0"),
    "e.csv": (b"text\n\xff\n", r"e\.csv: not UTF-8"),
    "f.csv": ("text\na\0b\n", r"f\.csv, line 2: contains zero bytes"),
    "a.json": ("{", r"a\.json: not JSON"),
    "b.json": ("[" * 100_000, r"b\.json: not JSON that can be read \(nested too deeply\)"),
    "c.json": (b'["\xff"]', r"c\.json: not UTF-8"),
    "d.json": ('[{"text": "a"}, {"text": 1}]', r"d\.json, record 2: text has type int"),
    "e.json": ('{"text": ["a", "b"]}', r"e\.json, record 1: text has type list"),
    "f.json": ("3", r"f\.json, record 1: no text column"),
    "a.jsonl": (
        '{"text": "a", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}",
        r"a\.jsonl, line 1: not JSON that can be",
    ),
    "b.jsonl": ('{"\\n": 1}', r"b\.jsonl, line 1: no text column; it has \\n"),
    "a.parquet.gz": ("x", r"a\.parquet\.gz: compressed Parquet"),
    "a\nb.txt": (b"\xff", r"a\\nb\.txt: not a text file \(it is not UTF-8\)"),
    "utf16.txt": ("text".encode("utf-16"), r"utf16\.txt: not a text file \(it is UTF-16, not UTF-8\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"^source .*{message}") as caught:
        documents(tmp_path / name)
    assert "\n" not in str(caught.value)
    if "compressed" not in message:
        items = list(read_pieces(find_inputs([str(tmp_path / name)]).files, Reading(skip_errors=True)))
        (item,) = [item for item in items if isinstance(item, LeftOut)]
        assert str(caught.value).startswith(item.text)


def test_skipping_errors(tmp_path, capsys):
    """Bad files and records are counted and listed; the good ones are all there, whole."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes(b"long " * 300_000 + b"\xff")  # more than a piece, and only its end is bad
    lines = ['{"text": "1"}', "{", '{"text": "3"}', '{"body": "4"}', '{"text": 5}', '{"text": "6"}']
    (folder / "c.jsonl").write_text("\n".join(lines))
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"cut off" * 100)[:-10])
    (folder / "e.parquet").write_text("no table")
    with pytest.raises(
        ConfigError, match=r"b\.txt: not a text file \(it is not UTF-8\); `mythos data prepare --on-error"
    ):
        prepare([str(folder)], tmp_path / "stop", seq_len=8, held_out_fraction=0.0)
    command = ["data", "prepare", str(folder), "--out", str(tmp_path / "out"), "--held-out-fraction", "0"]
    assert main([*command, "--on-error", "skip"]) == 0
    assert texts(tmp_path / "out", "train") == ["good", "1", "3", "6"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    found = [line.removeprefix(f"source {folder}/").split(" (")[0].split(";")[0] for line in manifest["left_out"]]
    assert found == [
        "b.txt: not a text file",
        "c.jsonl, line 2: not JSON",
        "c.jsonl, line 4: no text column",
        "c.jsonl, line 5: text has type int, allowed: a string",
        "d.txt.gz: damaged, or not a .gz file",
        "e.parquet: not a Parquet file",
    ]
    assert manifest["left_out_count"] == 6
    printed = capsys.readouterr()
    assert "left out: 6 files and records" in printed.out
    assert all(f"left out: {line}\n" in printed.err for line in manifest["left_out"])
    assert main([*command, "--on-error", "skip"]) == 0  # again: it is there
    assert "left out: 6 files and records" in capsys.readouterr().out


def test_the_list_of_what_is_skipped_is_bounded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "{\n" * 3000)
    options = {"seq_len": 8, "held_out_fraction": 0.0, "on_error": "skip", "progress": False}
    manifest = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **options)
    assert manifest.left_out_count == 3000
    assert len(manifest.left_out) == 1000


def test_one_good_document_among_bad_ones_is_divided(tmp_path):
    (tmp_path / "a.jsonl").write_text('{\n{"text": "one\\ntwo"}\n{')
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", seq_len=8, held_out_fraction=0.4, on_error="skip")
    assert (texts(tmp_path / "out", "train"), texts(tmp_path / "out", "held_out")) == (["one\n"], ["two"])


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names of any bytes")
def test_names_of_any_bytes(tmp_path):
    name = os.fsdecode(b"bad\xff\n.txt")
    (tmp_path / name).write_text("text é")
    assert documents(tmp_path) == ["text é"]
    prepare([str(tmp_path / name)], tmp_path / "out", seq_len=8, held_out_fraction=0.5)
    assert texts(tmp_path / "out", "train") + texts(tmp_path / "out", "held_out") == ["tex", "t é"]
    bad = tmp_path / os.fsdecode(b"out\xff")
    with pytest.raises(ConfigError, match="the folder's name is not UTF-8"):
        prepare([str(tmp_path / name)], bad, seq_len=8, held_out_fraction=0.5)
    (tmp_path / "out").rename(bad)
    assert texts(bad, "train") + texts(bad, "held_out") == ["tex", "t é"]


def test_sources_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source, message in [
        (str(tmp_path / "pipe"), "neither a file nor a folder"),
        ("gs://bucket/text", r"pip install gcsfs"),
    ]:
        with pytest.raises(ConfigError, match=message):
            find_inputs([source])
