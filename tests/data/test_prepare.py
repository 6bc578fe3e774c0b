"""Prepared folders: the stored rows, all kinds of sources, errors, damage, and what a config accepts."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mythos_jax.config import Config, DataConfig, ModelConfig
from mythos_jax.data import readers as readers_module
from mythos_jax.data import row_file as row_file_module
from mythos_jax.data import sources as sources_module
from mythos_jax.data import text_parts as text_parts_module
from mythos_jax.data import units as units_module
from mythos_jax.data.destination import Destination
from mythos_jax.data.ensure import ensure_prepared
from mythos_jax.data.manifest import check_sums, load_manifest
from mythos_jax.data.prepare import prepare
from mythos_jax.data.split import is_held_out
from mythos_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from mythos_jax.errors import ConfigError

EOD = 256


def documents(count=40):
    return {f"{i:03d}.txt": f"document {i}: é 日本\r\n" * (i % 5) + f"end {i}" for i in range(count)}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in documents().items():
        (folder / name).write_bytes(text.encode())
    return folder


def read_rows(folder, split):
    """The stored rows, read without `TokenRows`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = sorted(folder.glob(f"{split}-*.array_record"))
    records = [record for file in files for record in ArrayRecordReader(str(file)).read_all()]
    rows = [record[: int.from_bytes(record[-12:-8], "little")] for record in records]  # then zeros, its length, a check
    return [np.frombuffer(row, manifest["dtype"]).tolist() for row in rows]


def join(rows):
    """The stream that the rows were cut from; neighbours must share a token."""
    stream = rows[0][:1]
    for row in rows:
        assert row[0] == stream[-1]
        stream += row[1:]
    return stream


def stream_of(texts):
    return [EOD] + [token for text in texts for token in [*text.encode(), EOD]]


@pytest.mark.parametrize("seq_len", [1, 7, 32, 10_000])
def test_every_token_is_a_target_exactly_once(corpus, tmp_path, seq_len):
    manifest = prepare([str(corpus)], tmp_path / "out", seq_len=seq_len, held_out_fraction=0.3)
    for split in ["train", "held_out"]:
        texts = [text for name, text in documents().items() if is_held_out(name, 0.3) == (split == "held_out")]
        expected = stream_of(texts)
        rows = read_rows(tmp_path / "out", split)
        assert join(rows) == expected
        assert [len(row) for row in rows[:-1]] == [seq_len + 1] * (len(rows) - 1)
        assert 2 <= len(rows[-1]) <= seq_len + 1
        summary = manifest.splits[split]
        assert summary.documents == len(texts) > 3
        assert summary.text_bytes == sum(len(text.encode()) for text in texts)
        assert summary.tokens == len(expected) - 1 == sum(len(row) - 1 for row in rows)
        assert summary.rows == len(rows)
        file, (shard,) = tmp_path / "out" / f"{split}-00000-of-00001.array_record", summary.shards
        assert shard.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert summary.file_bytes == shard.file_bytes == file.stat().st_size
    assert load_manifest(tmp_path / "out") == manifest
    check_sums(manifest, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_held_out_is_a_stable_property_of_the_name(corpus, tmp_path):
    # Written out, so that a changed hash, which would leak held-out text into training, fails here.
    chosen = [name for name in documents() if is_held_out(name, 0.1)]
    assert chosen == [n for n in documents() if int(hashlib.sha256(n.encode()).hexdigest()[:16], 16) / 2**64 < 0.1]
    assert 0 < len(chosen) < 12
    assert set(chosen) < {name for name in documents() if is_held_out(name, 0.4)}
    assert not any(is_held_out(name, 0.0) for name in documents())
    # Of the name within the source, wherever that is.
    moved = corpus.rename(tmp_path / "elsewhere")
    prepare([str(moved)], tmp_path / "out", seq_len=16, held_out_fraction=0.1)
    assert join(read_rows(tmp_path / "out", "held_out")) == stream_of([documents()[name] for name in chosen])


def test_fingerprint_is_of_the_data(corpus, tmp_path):
    first = prepare([str(corpus)], tmp_path / "a", seq_len=16, held_out_fraction=0.2)
    moved = corpus.rename(tmp_path / "elsewhere")
    assert prepare([str(moved)], tmp_path / "b", seq_len=16, held_out_fraction=0.2).fingerprint == first.fingerprint
    assert prepare([str(moved)], tmp_path / "c", seq_len=17, held_out_fraction=0.2).fingerprint != first.fingerprint
    (moved / "000.txt").write_text("another")
    assert prepare([str(moved)], tmp_path / "d", seq_len=16, held_out_fraction=0.2).fingerprint != first.fingerprint


def test_all_kinds_of_sources_give_the_same_stream(tmp_path):
    texts = ["one é", "", "two\nlines", "three"]  # an empty document is skipped
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"id": range(5), "text": [*texts, None]}), tmp_path / "b.parquet")
    folder = tmp_path / "c"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in [("1.txt", "one é"), ("2.md", ""), ("sub/3.py", "two\nlines"), ("sub/4.TXT", "three")]:
        (folder / name).write_bytes(text.encode())
    for name in ["image.png", ".hidden.txt", ".git/x.txt"]:
        (folder / name).write_bytes(b"\xff\x00")
    for source in ["a.jsonl", "b.parquet", "c"]:
        manifest = prepare([str(tmp_path / source)], tmp_path / f"out-{source}", seq_len=4, held_out_fraction=0.0)
        assert join(read_rows(tmp_path / f"out-{source}", "train")) == stream_of(["one é", "two\nlines", "three"])
        assert manifest.splits["held_out"].rows == 0


def test_each_row_of_a_file_is_a_document(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)))
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", seq_len=8, held_out_fraction=0.3)
    held_out = [f"text {i}" for i in range(50) if is_held_out(f"a.jsonl:{i + 1}", 0.3)]
    assert 5 < len(held_out) < 25
    assert join(read_rows(tmp_path / "out", "held_out")) == stream_of(held_out)


def test_long_documents_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_module, "PIECE_CHARACTERS", 16)
    monkeypatch.setattr(units_module, "ENCODE_BYTES", 40)
    monkeypatch.setattr(text_parts_module, "UNIT_BYTES", 100)
    text = "".join(f"line {i} ä\n" for i in range(30)) + "x" * 100
    (tmp_path / "long.txt").write_text(text)
    inputs = sources_module.find_inputs([str(tmp_path / "long.txt")]).files
    parts = [piece.text for piece in readers_module.read_pieces(inputs, readers_module.Reading())]
    assert len(parts) > 15
    assert max(map(len, parts)) <= 32
    assert all(part.endswith("\n") for part in parts if "x" not in part)
    manifest = prepare([str(tmp_path / "long.txt")] * 2, tmp_path / "out", seq_len=8, held_out_fraction=0.0)
    assert join(read_rows(tmp_path / "out", "train")) == stream_of([text, text])
    assert manifest.splits["train"].documents == 2


def test_max_bytes_truncates_the_text_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("dé" * 10)
    sources = [str(tmp_path / name) for name in ["a.txt", "b.txt"]]
    for limit, texts in [(2, ["ab"]), (3, ["abc"]), (5, ["abc", "d"]), (6, ["abc", "dé"]), (99, ["abc", "dé" * 10])]:
        prepare(sources, tmp_path / f"out{limit}", seq_len=8, held_out_fraction=0.0, max_bytes=limit)
        assert join(read_rows(tmp_path / f"out{limit}", "train")) == stream_of(texts), limit


def words_tokenizer(path, size=6, more=()):
    vocabulary = {"a": 0, "b": 1, "[UNK]": 2} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), *(AddedToken(name, special=True) for name in more)])
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(("size", "dtype"), [(65_535, "<u2"), (65_536, "<u4")])
def test_tokenizer_json(tmp_path, size, dtype):
    (tmp_path / "a.txt").write_text(f"a b w{size - 1}")
    spec = words_tokenizer(tmp_path / "words.json", size)
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=spec, seq_len=8, held_out_fraction=0.0)
    assert manifest.dtype == dtype
    assert (manifest.vocab_size, manifest.end_of_document) == (size + 1, size)
    assert read_rows(tmp_path / "out", "train") == [[size, 0, 1, size - 1, size]]
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.fingerprint == manifest.tokenizer_fingerprint
    assert tokenizer.encode("b a").tolist() == [1, 0]
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json: missing"):
        load_manifest(tmp_path / "out")


def test_an_end_of_document_token_of_another_name(tmp_path):
    (tmp_path / "a.txt").write_text("a b\nb a b")
    spec = str(words_tokenizer(tmp_path / "words.json", more=["<doc>"]))
    options = {"tokenizer": spec, "seq_len": 8, "held_out_fraction": 0.5}
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", end_of_document="<doc>", **options)
    assert manifest.end_of_document == 7
    assert read_rows(tmp_path / "out", "train") == [[7, 0, 1, 7]]
    with pytest.raises(
        ConfigError,
        match=r"end_of_document: got token 6 of words.json, allowed: token 7, with",
    ):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", **options)
    data = DataConfig(path=str(tmp_path / "out"), tokenizer=spec, seq_len=8, end_of_document="<doc>")
    assert ensure_prepared(Config(data=data)) == manifest
    with pytest.raises(ConfigError, match=r"data\.end_of_document: got token 6"):
        ensure_prepared(Config(data=dataclasses.replace(data, end_of_document=None)))
    other = dataclasses.replace(data, path=str(tmp_path / "new"), sources=(str(tmp_path / "a.txt"),))
    assert ensure_prepared(Config(data=other)).end_of_document == 7


def test_standard_library(tmp_path):
    found = sources_module.find_inputs(["stdlib"])
    inputs, skipped = found.files, found.skipped
    names = [item.name for item in inputs]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert len(names) == len(set(names)) > 300
    assert not [name for name in names if "site-packages" in name or "/test/" in name or not name.endswith(".py")]
    assert skipped < 5
    manifest = prepare(["stdlib"], tmp_path / "out", seq_len=64, held_out_fraction=0.5, max_bytes=500_000)
    assert sum(split.text_bytes for split in manifest.splits.values()) == 500_000
    assert manifest.splits["held_out"].text_bytes > 0
    assert manifest.in_bytes


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [str(path)]


INVALID = {
    "missing": (lambda d: [str(d / "no.txt")], r"source .*no\.txt: no such file"),
    "none": (lambda d: [], r"sources: got \[\], allowed: files"),
    "empty file": (lambda d: write(d / "empty.txt", ""), r"no text in .*empty\.txt"),
    "empty folder": (lambda d: (d / "sub").mkdir() or [str(d / "sub")], r"sub: nothing to read.*\.txt"),
    "binary": (lambda d: write(d / "a.bin", b"\x80\x81"), r"source .*a\.bin: not a text file \(it is not UTF-8\)"),
    "zeros": (lambda d: write(d / "a.bin", bytes(10)), r"source .*a\.bin: not a text file \(it contains zero bytes\)"),
    "binary in a folder": (lambda d: write(d / "z.txt", b"\xff") and [str(d)], r"z\.txt: not a text file"),
    "cut character": (lambda d: write(d / "a.txt", "é".encode()[:1]), r"a\.txt: not a text file"),
    "no column": (
        lambda d: write(d / "a.jsonl", '{"text": "a"}\n\n{"body": "b"}\n'),
        r"a\.jsonl, line 3: no text column",
    ),
    "a list": (lambda d: write(d / "a.jsonl", "[1]"), r"a\.jsonl, line 1: no text column"),
    "a number": (lambda d: write(d / "a.jsonl", '{"text": 3}'), r"a\.jsonl, line 1: text has type int"),
    "not json": (lambda d: write(d / "a.jsonl", '{"text": "a"}\n{"te'), r"a\.jsonl, line 2: not JSON"),
    "not utf-8": (lambda d: write(d / "a.jsonl", b'{"text": "\xff"}'), r"a\.jsonl, line 1: not UTF-8"),
    "surrogate": (
        lambda d: write(d / "a.jsonl", r'{"text": "\ud800"}'),
        r"a\.jsonl, line 1: text is not valid Unicode",
    ),
    "not parquet": (lambda d: write(d / "a.parquet", "hello" * 10), r"a\.parquet: not a Parquet file"),
    "parquet column": (
        lambda d: pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), d / "a.parquet") or [f"{d}/a.parquet"],
        r"a\.parquet: no text column; it has body",
    ),
    "parquet type": (
        lambda d: pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), d / "a.parquet") or [f"{d}/a.parquet"],
        r"a\.parquet, row 1: text has type int",
    ),
    "one character": (lambda d: write(d / "000.txt", "é"), r"the only document has one character"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_sources_give_a_one_line_error_and_leave_no_files(tmp_path, case):
    make, message = INVALID[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "work").mkdir()
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(make(tmp_path / "in"), tmp_path / "work" / "out", seq_len=8, held_out_fraction=0.1)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_tokenizer_that_produces_no_tokens(tmp_path):
    spec = words_tokenizer(tmp_path / "words.json")
    with pytest.raises(ConfigError, match="produces no tokens"):
        prepare(write(tmp_path / "a.txt", "  \n "), tmp_path / "out", tokenizer=spec, seq_len=8, held_out_fraction=0.0)


def test_an_existing_folder_is_never_overwritten(corpus, tmp_path, monkeypatch):
    def state():
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").iterdir()}

    def prepare_again(**changes):
        return prepare([str(corpus)], tmp_path / "out", **{"seq_len": 16, "held_out_fraction": 0.2} | changes)

    first = prepare_again()
    before = state()
    assert prepare_again() == first  # the same request is not an error
    for change, message in [
        ({"seq_len": 8}, r"seq_len: got 8, allowed: 16, with which .*out was prepared"),
        ({"held_out_fraction": 0.3}, r"held_out_fraction: got 0.3, allowed: 0.2"),
        ({"max_bytes": 10}, r"max_bytes: got 10, allowed: 0"),
        ({"tokenizer": words_tokenizer(tmp_path / "w.json")}, r"tokenizer: got w\.json .*, allowed: bytes"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare_again(**change)
    (corpus / "new.txt").write_text("more")
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)  # the names and sizes of the files are enough
    with pytest.raises(ConfigError, match="holds different data"):
        prepare_again()
    assert state() == before
    for occupied in [corpus, corpus / "new.txt"]:
        with pytest.raises(ConfigError, match="already exists and holds something else"):
            prepare([str(corpus)], occupied, seq_len=16, held_out_fraction=0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out", "w.json"]


def test_a_destination_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"file/out: cannot be written \(Not a directory\)"):
        prepare([str(corpus)], tmp_path / "file" / "out", seq_len=16, held_out_fraction=0.2)


def test_a_destination_that_cannot_be_replaced(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)  # said before any text is tokenized
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(ConfigError, match=r"disk: cannot be replaced, a disk is mounted there"):
        prepare([str(corpus)], tmp_path / "disk", seq_len=16, held_out_fraction=0.2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_full_disk(corpus, tmp_path, monkeypatch, split):
    path = row_file_module.RowFile._path

    def prepare_out(split):
        paths = {split: Path("/dev/full")}
        monkeypatch.setattr(row_file_module.RowFile, "_path", lambda self, n: paths.get(self.split, path(self, n)))
        return prepare([str(corpus)], tmp_path / "out", seq_len=16, held_out_fraction=0.2)

    with pytest.raises(ConfigError, match=r"/dev/full: cannot be written \(.*No space left on device"):
        prepare_out(split)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)  # what was tokenized is kept
    assert prepare_out("").splits["train"].documents > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_damage_is_named(corpus, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="out: no such folder"):
        load_manifest(out)
    with pytest.raises(ConfigError, match=r"corpus: has no manifest\.json"):
        load_manifest(corpus)
    prepare([str(corpus)], out, seq_len=16, held_out_fraction=0.2)
    file, manifest = out / "train-00000-of-00001.array_record", out / "manifest.json"
    content, text = file.read_bytes(), manifest.read_text()

    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    found = load_manifest(out)  # compares sizes only
    with pytest.raises(ConfigError, match=r"train-00000-of-00001\.array_record: its checksum"):
        check_sums(found, out)
    file.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"train-00000-of-00001\.array_record: got \d+ bytes, the manifest says \d+"):
        load_manifest(out)
    file.unlink()
    with pytest.raises(ConfigError, match=r"train-00000-of-00001\.array_record: missing"):
        load_manifest(out)
    file.write_bytes(content)
    for damaged, message in [
        (text.replace('"seq_len": 16', '"seq_len": 17'), "has changed since"),
        (text.replace('"version": 2', '"version": 3'), "got version 3, allowed: 1 to 2"),
        (text.replace('"sha256": "', '"sha256": "0', 1), "has changed since"),  # of a shard
        (text[:100], "not a manifest"),
        ("[]", "not a manifest"),
        ('{"version": 1, "fingerprint": ""}', "not a manifest"),
    ]:
        assert damaged != text
        manifest.write_text(damaged)
        with pytest.raises(ConfigError, match=r"manifest\.json: " + message):
            load_manifest(out)
    manifest.write_text(text)
    check_sums(load_manifest(out), out)


def test_ensure_prepared(corpus, tmp_path):
    data = DataConfig(path=str(tmp_path / "out"), sources=(str(corpus),), seq_len=16, held_out_fraction=0.2)
    config = Config(data=data)

    def changed(**changes):
        return dataclasses.replace(config, data=dataclasses.replace(data, **changes))

    with pytest.raises(ConfigError, match=r"data\.path: nothing prepared at .*out, and data\.sources names nothing"):
        ensure_prepared(changed(sources=()))
    manifest = ensure_prepared(config)
    written = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert ensure_prepared(config) == manifest == ensure_prepared(changed(sources=(), held_out_fraction=0.5))
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == written
    words = str(words_tokenizer(tmp_path / "w.json"))
    for wrong, message in [
        (changed(seq_len=8), r"data\.seq_len: got 8, allowed: 16"),
        (changed(tokenizer=words), r"data\.tokenizer: got w\.json"),
        (changed(sources=("stdlib",)), r"data\.sources: got \['stdlib'\], allowed: .*corpus"),
        (changed(held_out_fraction=0.3), r"data\.held_out_fraction: got 0\.3, allowed: 0\.2"),
        (dataclasses.replace(config, model=ModelConfig(vocab_size=257)), r"model\.vocab_size: got 257.* at least 258"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ensure_prepared(wrong)


def test_text_that_has_changed_is_refused_by_a_new_run_and_announced_to_one_that_has_begun(corpus, tmp_path, capsys):
    data = DataConfig(path=str(tmp_path / "out"), sources=(str(corpus),), seq_len=16, held_out_fraction=0.2)
    config = Config(data=data)
    manifest = ensure_prepared(config, progress=False)
    os.utime(corpus / "000.txt", ns=(0, 0))
    capsys.readouterr()
    assert ensure_prepared(config) == manifest
    assert "data.sources: their times differ from when" in capsys.readouterr().err
    # The same text in another place, and preparing anew, which finds that it is the same.
    moved = shutil.copytree(corpus, tmp_path / "moved" / "corpus")
    prepare([str(corpus)], tmp_path / "out", seq_len=16, held_out_fraction=0.2, progress=False)
    assert ensure_prepared(config) == load_manifest(tmp_path / "out") != manifest
    sources = [str(corpus)]
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert json.loads(text)["sources"] == sources
    (tmp_path / "out" / "manifest.json").write_text(text.replace(json.dumps(sources[0]), json.dumps(str(moved))))
    moved_config = Config(data=dataclasses.replace(data, sources=(str(moved),)))
    ensure_prepared(moved_config)
    assert capsys.readouterr().err == ""

    (moved / "new.txt").write_text("more")
    with pytest.raises(
        ConfigError, match=r"data\.sources: the text has changed since .*out was prepared; allowed: del"
    ):
        ensure_prepared(moved_config)
    ensure_prepared(Config(data=dataclasses.replace(data, sources=())))  # as the message says
    assert capsys.readouterr().err == ""
    ensure_prepared(moved_config, resumes=True)
    assert "has changed since" in capsys.readouterr().err
    ensure_prepared(moved_config, prepare_missing=False)  # the other processes of a run leave it to the first
    shutil.rmtree(moved)  # on a machine without the sources there is nothing to compare
    ensure_prepared(moved_config)
    assert capsys.readouterr().err == ""


def test_a_folder_prepared_by_0_1_0(corpus, tmp_path, capsys):
    """Its manifest has no hash of names and sizes: a change is announced, and not refused."""
    data = DataConfig(path=str(tmp_path / "out"), sources=(str(corpus),), seq_len=16, held_out_fraction=0.2)
    manifest = ensure_prepared(Config(data=data), progress=False)
    file = tmp_path / "out" / "manifest.json"
    fields = json.loads(file.read_text())
    for name in ["files", "times", "text_column", "left_out", "left_out_count"]:
        del fields[name]
    file.write_text(json.dumps(fields))
    assert ensure_prepared(Config(data=data)) == dataclasses.replace(manifest, files="", times="")
    assert load_manifest(tmp_path / "out").fingerprint == manifest.fingerprint
    (corpus / "new.txt").write_text("more")
    capsys.readouterr()
    ensure_prepared(Config(data=data))
    assert "the text may be another one" in capsys.readouterr().err


def test_two_processes_at_once_make_one_folder(corpus, tmp_path, monkeypatch):
    """Another process finishes first: its folder stays, and is accepted if it holds the same data."""
    publish = Destination.publish

    def publish_second(seq_len):
        """Makes the next `prepare` wait, when it is complete, for another one with this seq_len."""

        def run_other(self, rows, manifest):
            monkeypatch.setattr(Destination, "publish", publish)
            prepare([str(corpus)], self.out, seq_len=seq_len, held_out_fraction=0.2)
            return publish(self, rows, manifest)

        monkeypatch.setattr(Destination, "publish", run_other)

    publish_second(seq_len=16)
    first = prepare([str(corpus)], tmp_path / "same", seq_len=16, held_out_fraction=0.2)
    assert first == load_manifest(tmp_path / "same")
    publish_second(seq_len=8)
    with pytest.raises(ConfigError, match="holds different data"):
        prepare([str(corpus)], tmp_path / "other", seq_len=16, held_out_fraction=0.2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if "partial" not in name] == ["corpus", "other", "same"]


def test_heavy_libraries_are_imported_late():
    code = "import sys, mythos_jax.data.prepare; print({'grain', 'pyarrow', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
