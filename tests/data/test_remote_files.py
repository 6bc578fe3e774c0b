"""Files of a store by their names, and stores that cannot do everything."""

import fsspec
import pytest

from mythos_jax.cli import main
from mythos_jax.data import remote as remote_module
from mythos_jax.data.remote import relative
from mythos_jax.data.sources import find_inputs
from mythos_jax.data.work_files import WorkFiles
from mythos_jax.errors import ConfigError, StorageError

MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def bucket(tmp_path):
    yield f"/{tmp_path.name}"
    if MEMORY.exists(f"/{tmp_path.name}"):
        MEMORY.rm(f"/{tmp_path.name}", recursive=True)


def test_names_in_a_folder():
    assert relative("data/x", "data") == relative("/data/x", "data/") == relative("data/x", "/data") == "x"
    assert relative("data2/x", "data") == "data2/x"
    assert relative("a@main/data/x", "a/data") == "a@main/data/x"
    assert relative("/a/x", "") == relative("a/x", "/") == "a/x"


def test_a_file_whose_name_is_like_a_pattern(bucket):
    for name in ["a[1].txt", "a1.txt", "b[2]/x.txt", "b[2]/c/x.txt"]:
        MEMORY.pipe_file(f"{bucket}/{name}", name.encode())

    def names(pattern):
        return [file.name for file in find_inputs([f"memory:/{bucket}/{pattern}"]).files]

    assert names("a[1].txt") == ["a[1].txt"]
    assert names("a[12].txt") == ["a1.txt"]
    assert names("b[2]") == ["x.txt", "c/x.txt"]


def test_a_server_that_does_not_say_how_long_a_file_is(bucket, tmp_path, monkeypatch, capsys):
    MEMORY.pipe_file(f"{bucket}/a.txt", b"text")
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "size", None)
    url = f"memory:/{bucket}/a.txt"
    assert main(["data", "prepare", url, "--out", str(tmp_path / "out")]) == 2
    line = "/a.txt: cannot be read (its server does not say how long it is, or sends it only as a whole; download it"
    assert line in capsys.readouterr().err


def test_what_cannot_be_written_is_no_source(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "FIRST_PAUSE", 0.001)
    files = WorkFiles(f"memory:/{bucket}/out")
    (tmp_path / "a").write_text("a")
    files.write("b", b"")
    for method, call, verb in [
        ("pipe_file", lambda: files.write("a", b""), "written"),
        ("put_file", lambda: files.put(tmp_path / "a", "a"), "written"),
        ("rm_file", lambda: files.delete("a"), "deleted"),
        ("cat_file", lambda: files.read("a"), "read"),
        ("info", lambda: files.size("b"), "read"),
        ("info", files.names, "read"),
    ]:
        for error, kind in [(OSError("reset"), StorageError), (ValueError("bad name"), ConfigError)]:

            def fail(*_, error=error, **__):
                raise error

            monkeypatch.setattr(MEMORY, method, fail)
            with pytest.raises(kind, match=rf"^memory:/{bucket}/out: cannot be {verb} \({error}\)"):
                call()
