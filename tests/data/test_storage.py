"""Which trouble of storage is waited for and which ends a run; what is copied from a bucket. Rows: test_shards.py."""

import itertools

import pytest

from mythos_jax.data import fetch, storage
from mythos_jax.data.fetch import local_folder
from mythos_jax.data.prepare import prepare
from mythos_jax.data.storage import Part, Storage, WrongBytesError
from mythos_jax.errors import ConfigError, StorageError

URL = "gs://bucket/rows"


class Store:
    """An object store that holds one folder. errors: those of the next calls, in turn; None: the call succeeds."""

    def __init__(self):
        self.files, self.errors, self.read = {}, iter(()), []

    def _answer(self):
        error = next(self.errors, None)
        if error is not None:
            raise error

    def cat_file(self, path, start, end):
        self._answer()
        self.read.append(path.rpartition("/")[2])
        return self.files[path.rpartition("/")[2]][start:end]

    def ls(self, path, detail):
        self._answer()
        return [{"name": f"{path}/{name}", "size": len(self.files[name]), "type": "file"} for name in self.files]

    def invalidate_cache(self):
        pass


@pytest.fixture
def store(monkeypatch, tmp_path):
    """The Store at URL, which is asked again at once."""
    found = Store()
    monkeypatch.setattr(storage, "open_file_system", lambda url: (found, url.removeprefix("gs://")))
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("MYTHOS_DATA_CACHE", str(tmp_path / "cache"))
    return found


AWAY, HALF, GONE = OSError("503: try later"), WrongBytesError("got 3 of 4 bytes"), FileNotFoundError("a")
BAD_REQUEST = ValueError("Bad Request: bucket/a\nInvalid Credentials")  # gcsfs's for any answer that says "invalid"


@pytest.mark.parametrize("errors", [[AWAY, AWAY, HALF], [GONE] * 4, [HALF, HALF, AWAY, HALF], [BAD_REQUEST] * 4])
def test_trouble_that_passes_does_not_end_a_run(store, errors):
    store.files["a"], store.errors = b"1234", iter(errors)
    assert Storage(URL).read([Part("a", 0, 4)]) == [b"1234"]
    assert next(store.errors, None) is None


@pytest.mark.parametrize(
    ("errors", "kind", "message"),
    [
        (itertools.chain([AWAY] * 3, itertools.repeat(GONE)), ConfigError, "rows: a: missing$"),
        (itertools.repeat(HALF), ConfigError, "rows: a: got 3 of 4 bytes$"),
        (itertools.repeat(BAD_REQUEST), StorageError, "rows: a: cannot be read for 0.2 s .*Invalid Credentials"),
        (itertools.cycle([AWAY, GONE]), StorageError, "rows: a: cannot be read for 0.2 s"),
    ],
)
def test_trouble_that_lasts_ends_a_run_as_what_it_is(store, monkeypatch, errors, kind, message):
    monkeypatch.setattr(storage, "LASTING_PATIENCE", 0.05)
    if kind is StorageError:
        monkeypatch.setattr(storage, "PATIENCE", 0.2)
    store.errors = errors
    with pytest.raises(kind, match=message):
        Storage(URL).read([Part("a", 0, 4)])


def test_a_mount_that_is_gone_is_waited_for_and_a_missing_file_is_not(store, tmp_path, monkeypatch):
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(storage, "LASTING_PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "PATIENCE", 0.1)
        for folder in (tmp_path / "mount", tmp_path / "none"):
            with pytest.raises(StorageError, match=r"a: cannot be read for 0.1 s \(the folder is not there, or empty"):
                Storage(folder).read([Part("a", 0, 4)])
    (tmp_path / "mount" / "b").write_bytes(b"1234")
    with pytest.raises(ConfigError, match="a: missing"):
        Storage(tmp_path / "mount").read([Part("a", 0, 4)])


def test_a_process_that_was_suspended_during_a_call_that_failed_asks_again(store, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.0)  # as if all of it were over
    store.files["a"], store.errors = b"1234", iter([AWAY, AWAY])
    assert Storage(URL).read([Part("a", 0, 4)]) == [b"1234"]


def test_lines_of_a_process_name_it(store, monkeypatch, capsys):
    monkeypatch.setattr(storage, "process_prefix", lambda: "process 3: ")
    store.files["a"], store.errors = b"1234", iter([AWAY])
    Storage(URL).read([Part("a", 0, 4)])
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("process 3: gs://bucket/rows: a: cannot be read (503")
    assert last.startswith("process 3: gs://bucket/rows: no read is failing any more")


def test_only_what_belongs_to_the_rows_is_copied(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "process_prefix", lambda: "process 3: ")
    (tmp_path / "a.txt").write_text("a text of some words\n" * 40)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", seq_len=16, held_out_fraction=0.2, progress=False)
    store.files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    rows = {name for name in store.files if name.endswith(".array_record")}
    assert len(rows) == 2
    store.files |= {name: b"{}" for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}
    wanted = set(store.files)
    store.files |= {"train-00000-of-00009.array_record": bytes(9), "notes.md": b"text", "rows_at": b"elsewhere"}
    for copy, expected in [(False, wanted - rows | {"rows_at"}), (True, wanted)]:
        folder = local_folder(URL, copy=copy)
        assert {file.name for file in folder.iterdir()} == expected
        assert set(store.read) <= wanted
    assert f"process 3: copying {URL} to " in capsys.readouterr().err


def test_a_bucket_that_may_not_be_read_is_not_called_empty(store):
    store.errors = itertools.repeat(PermissionError("Forbidden: bucket/rows"))
    with pytest.raises(ConfigError, match=r"rows: the folder: Forbidden: bucket/rows$"):
        local_folder(URL)
    store.errors = itertools.repeat(FileNotFoundError("bucket/rows"))
    with pytest.raises(ConfigError, match=r"rows: nothing prepared there"):
        local_folder(URL)
