"""Sources that are URLs, on fsspec's file system in memory: the documents of a disk, and storage that fails."""

import gzip
import json
import tracemalloc

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mythos_jax.cli import main
from mythos_jax.data import remote as remote_module
from mythos_jax.data.prepare import prepare
from mythos_jax.data.readers import Reading, read_pieces
from mythos_jax.data.sources import find_inputs
from mythos_jax.errors import ConfigError
from tests.data.test_sources import compress
from tests.data.test_split import texts

MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder on the disk and a copy of it at memory://corpus."""
    folder = tmp_path / "corpus"
    for name in ["b", "b/.git", "made"]:
        (folder / name).mkdir(parents=True)
    lines = [json.dumps({"text": f"line {i}", "title": f"title {i}"}) + "\n" for i in range(30)]
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "b" / "a.jsonl.zst").write_bytes(compress("".join(lines[:9]).encode(), ".zst"))
    table = pyarrow.table({"text": [f"row {i}" for i in range(50)], "title": ["", None] * 25})
    pyarrow.parquet.write_table(table, folder / "b" / "z.parquet", row_group_size=7)
    for name in [
        "a.txt",
        "z.txt",
        "image.png",
        ".hidden.txt",
        "b/.git/x.txt",
        "made/manifest.json",
        "made/a.array_record",
    ]:
        (folder / name).write_text(f"text of {name}")
    MEMORY.put(str(folder), "/corpus", recursive=True)
    monkeypatch.setattr(remote_module, "FIRST_PAUSE", 0.001)
    yield folder
    MEMORY.rm("/corpus", recursive=True)


def test_a_url_gives_the_same_rows_as_the_folder(corpus, tmp_path, capsys):
    options = {"seq_len": 8, "held_out_fraction": 0.2, "progress": False}
    local = prepare([str(corpus)], tmp_path / "local", **options)
    stored = prepare(["memory://corpus"], tmp_path / "stored", **options)
    assert stored.fingerprint == local.fingerprint
    assert stored.splits == local.splits
    assert local.splits["train"].documents + local.splits["held_out"].documents == 91
    left_out = "left out 1 .png, 2 hidden files, 1 prepared folder"
    assert sorted(stored.left_out[0].partition("left out ")[2].split(", ")) == sorted(left_out[9:].split(", "))
    assert prepare(["memory://corpus/"], tmp_path / "again", **options).splits == stored.splits
    capsys.readouterr()
    with MEMORY.open("/corpus/a.txt", "wb") as file:
        file.write(b"other")
    with pytest.raises(ConfigError, match="the sources have changed"):
        prepare(["memory://corpus"], tmp_path / "stored", **options)


def test_files_and_patterns(corpus):
    def names(url):
        return [(file.name, file.given) for file in find_inputs([url]).files]

    assert names("memory://corpus/c.jsonl.gz") == [("c.jsonl.gz", True)]
    assert names("memory://corpus/*.txt") == [(".hidden.txt", True), ("a.txt", True), ("z.txt", True)]
    assert names("memory://corpus/**/z.[pt]*") == [("z.txt", True), ("b/z.parquet", True)]
    for url in ["memory://corpus/none.txt", "memory://corpus/*.csv", "memory://nowhere"]:
        with pytest.raises(ConfigError, match=r"^source memory://.*: no such file or folder$"):
            find_inputs([url])
    with pytest.raises(ConfigError, match=r"^nope://a: cannot be opened \(Protocol not known: nope\)$"):
        find_inputs(["nope://a"])


def test_storage_that_fails_is_asked_again_and_then_ends_the_command(corpus, tmp_path, monkeypatch, capsys):
    read, failures = fsspec.implementations.memory.MemoryFile.read, []

    def fail(self, *arguments):
        if len(failures) < limit:
            failures.append(self.tell())
            raise OSError("connection reset\nby peer")
        return read(self, *arguments)

    expected = [piece.text for piece in read_pieces(find_inputs([str(corpus)]).files, Reading())]
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", fail)
    limit = 3
    inputs = find_inputs(["memory://corpus"]).files
    assert [piece.text for piece in read_pieces(inputs, Reading(skip_errors=True))] == expected
    assert "a.txt: cannot be read (connection reset by peer); trying again\n" in capsys.readouterr().err
    limit = 10**9
    arguments = ["data", "prepare", "memory://corpus/z.txt", "--out", str(tmp_path / "out"), "--on-error", "skip"]
    assert main(arguments) == 42  # not left out: it may be there again
    assert "z.txt: cannot be read (connection reset by peer); the same command" in capsys.readouterr().err


def test_several_text_columns(corpus, tmp_path):
    command = ["data", "prepare", "--out", str(tmp_path / "out"), "--held-out-fraction", "0", "--text-column"]
    assert main([*command, "title,text", "memory://corpus/c.jsonl.gz", str(corpus / "b" / "z.parquet")]) == 0
    expected = [*(f"title {i}\n\nline {i}" for i in range(30)), *(f"row {i}" for i in range(50))]
    assert texts(tmp_path / "out", "train") == expected
    (tmp_path / "a.csv").write_text("text,title\na,b\n,\n,c\n")
    pieces = read_pieces(find_inputs([str(tmp_path / "a.csv")]).files, Reading("title,text"))
    assert [piece.text for piece in pieces] == ["b\n\na", "c"]
    for name in ["a.csv", "corpus/b/z.parquet", "corpus/c.jsonl.gz"]:
        with pytest.raises(ConfigError, match=r"no body and no id column; it has t[a-z]+, t[a-z]+ \(--text-column"):
            list(read_pieces(find_inputs([str(tmp_path / name)]).files, Reading("body,text,id")))


def test_a_parquet_file_is_in_memory_row_group_by_row_group(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.bytes(5000).hex() for _ in range(1600)]  # 16 MB, in groups of 0.4 MB
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet", row_group_size=40)
    inputs = find_inputs([str(tmp_path / "a.parquet")]).files
    arrow, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert sum(len(piece.text) for piece in read_pieces(inputs, Reading())) == 16_000_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
        assert 0 < pool.max_memory() < 4_000_000
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(arrow)
