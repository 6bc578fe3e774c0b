"""Random small corpora: `mythos data prepare` ends with one line, or its rows are exactly the documents.

300 corpora under `make fuzz`: odd names, bytes and Unicode, folders, links, compression, empty files, broken records.
What the documents are is known from how the files were made; nothing is read with the package's readers.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
from hypothesis import given
from hypothesis import strategies as st

from mythos_jax.cli import main
from mythos_jax.data import readers, text_parts
from tests.data.test_split import texts
from tests.fuzz.budget import budget, no_hang

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
LONG = st.builds(lambda text, count: text * count, TEXT, st.integers(1, 9))
NAME = st.text(st.sampled_from("ab é日\n'\"\\*%\udcff"), max_size=5)


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@dataclass
class File:
    """A file of a corpus. documents: that it has; bad: whether a part of it, or all of it, cannot be read."""

    suffix: str
    content: bytes
    documents: list[str] = field(default_factory=list)
    bad: bool = False


def text_file(content):
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return File(".txt", content, bad=True)
    bad = "\0" in text
    return File(".txt", content, [] if bad else [text.removeprefix("\ufeff")], bad)


def json_lines(suffix, lines):
    """lines: a text for a good record, bytes for a bad one."""
    parts = [line if isinstance(line, bytes) else json.dumps({"n": 1, "text": line}).encode() for line in lines]
    bad = any(isinstance(line, bytes) for line in lines)
    return File(suffix, b"\n".join(parts), [line for line in lines if isinstance(line, str)], bad)


def json_array(documents, as_objects, cut_off):
    text = json.dumps([{"text": text} for text in documents] if as_objects else documents)
    return File(".json", text[:-1].encode(), bad=True) if cut_off else File(".json", text.encode(), documents)


def table(suffix, documents):
    stream = io.StringIO(newline="")
    rows = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",", quoting=csv.QUOTE_ALL)
    rows.writerows([["id", "text"], *([str(i), text] for i, text in enumerate(documents))])
    return File(suffix, stream.getvalue().encode(), documents)


def parquet(documents):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(documents, pyarrow.string())}), stream)
    return File(".parquet", stream.getvalue(), documents)


BROKEN = st.sampled_from([b"{", b'{"text": 1}', b'{"body": ""}', b"\xff", b'{"text": "\\ud800"}', b"[" * 5000, b"null"])
DOCUMENTS = st.lists(LONG, max_size=4)
FILES = st.one_of(
    LONG.map(lambda text: text_file(text.encode())),
    st.binary(max_size=40).map(text_file),
    st.builds(json_lines, st.sampled_from([".jsonl", ".ndjson"]), st.lists(LONG | BROKEN, max_size=5)),
    st.builds(json_lines, st.just(".jsonl"), DOCUMENTS),
    st.builds(json_array, DOCUMENTS, st.booleans(), st.booleans()),
    st.builds(table, st.sampled_from([".csv", ".tsv"]), DOCUMENTS),
    DOCUMENTS.map(parquet),
    st.just(File(".pdf", b"\xff")),
    st.just(File(".json", b'{"name": "package"}')),
)
CORPORA = st.lists(
    st.tuples(FILES, NAME, st.sampled_from(["", "sub", "sub/deep", "../linked"]), st.sampled_from(sorted(COMPRESS))),
    max_size=6,
)


def write_corpus(root, corpus):
    """Writes the files below `root`/in, with links that lead in circles and to nothing; returns those that are read."""
    for folder in ["in/sub/deep", "linked"]:
        (root / folder).mkdir(parents=True)
    (root / "in" / "link").symlink_to(root / "linked")
    (root / "in" / "sub" / "circle").symlink_to("..")
    (root / "linked" / "back").symlink_to(root / "in")
    (root / "in" / "broken.txt").symlink_to("nowhere")
    for number, (file, name, folder, compression) in enumerate(corpus):
        compression = "" if file.suffix == ".parquet" else compression
        path = root / "in" / folder / f"{number}{name}{file.suffix}{compression}"
        path.write_bytes(COMPRESS[compression](file.content))
    return [file for file, *_ in corpus if file.suffix != ".pdf"]


def run(*arguments):
    """The exit code and the lines on standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), no_hang():
        code = main(["data", "prepare", *map(str, arguments)])
    return code, errors.getvalue().splitlines()


@given(
    corpus=CORPORA,
    fraction=st.sampled_from([0.0, 0.05, 0.5, 0.99]),
    on_error=st.sampled_from(["stop", "skip"]),
    seq_len=st.integers(1, 40),
)
@budget(25, 300)
def test_a_corpus_is_refused_in_one_line_or_its_rows_are_its_documents(corpus, fraction, on_error, seq_len):
    readers.PIECE_CHARACTERS, before = 16, readers.PIECE_CHARACTERS
    text_parts.UNIT_BYTES, unit_bytes = 64, text_parts.UNIT_BYTES
    try:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            files = write_corpus(root, corpus)
            documents = [text for file in files for text in file.documents if text]
            refused = (
                not documents
                or (on_error == "stop" and any(file.bad for file in files))
                or (len(documents) == 1 and len(documents[0]) == 1 and fraction > 0)
            )
            options = ["--held-out-fraction", fraction, "--on-error", on_error, "--seq-len", seq_len, "--workers", 2]
            code, errors = run(root / "in", "--out", root / "out", *options)
            assert code == (2 if refused else 0), errors
            assert sum(line.startswith("mythos: ") for line in errors) == int(refused), errors
            if refused:
                assert not (root / "out").exists()
                return
            assert not any("partial" in path for path in os.listdir(root))
            train, held_out = (texts(root / "out", split) for split in ("train", "held_out"))
            if len(documents) == 1 and fraction:
                assert (len(train), len(held_out)) == (1, 1)
                train, held_out = [train[0] + held_out[0]], []
            assert sorted(train + held_out) == sorted(documents)
            if fraction and len(documents) > 1:
                assert train
                assert held_out
            manifest = json.loads((root / "out" / "manifest.json").read_text())
            assert (manifest["left_out_count"] > 0) == any(
                file.bad or file.content.startswith(b'{"name"') for file in files
            )
    finally:
        readers.PIECE_CHARACTERS, text_parts.UNIT_BYTES = before, unit_bytes
