"""Rows in shards: the same batches as from the one file of version 1, on a disk and in a bucket, whatever happens."""

import hashlib
import itertools
import os
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mythos_jax.cli import main
from mythos_jax.data import storage, stored_rows
from mythos_jax.data.fetch import local_folder
from mythos_jax.data.manifest import Manifest, Shard, Split, check_sums, load_manifest, shards_sha256
from mythos_jax.data.pipeline import eval_batches, open_rows, row_order, train_batches
from mythos_jax.data.prepare import prepare
from mythos_jax.data.reshard import reshard
from mythos_jax.data.shards import Layout, padded, sealed, shard_name
from mythos_jax.data.tokenizer import ByteTokenizer
from mythos_jax.errors import RESTART, ConfigError, StorageError

GOLDEN = Path(__file__).parents[1] / "golden" / "rows_1" / "rows.tar.gz"
T, URL = 32, "gs://bucket/rows"


class Bucket(MemoryFileSystem):
    """Keeps gs://bucket/x in memory. read: what was asked for, as (file, bytes). fault: called before each read with
    the number of reads so far; it may raise or wait, or return other bytes."""

    store, pseudo_dirs = {}, [""]
    read, fault = [], None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def cat_file(self, path, start=None, end=None, **keywords):
        Bucket.read.append((path.rpartition("/")[2], end - start))
        number = len(Bucket.read)
        changed = Bucket.fault(number) if Bucket.fault else None
        return super().cat_file(path, start, end, **keywords) if changed is None else changed


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    Bucket.store.clear()
    Bucket.read, Bucket.fault = [], None
    monkeypatch.setattr(storage, "open_file_system", lambda url: (Bucket(), Bucket._strip_protocol(url)))
    monkeypatch.setattr(stored_rows, "_cache", stored_rows._Cache())
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "LASTING_PATIENCE", 0.05)
    monkeypatch.setenv("MYTHOS_DATA_CACHE", str(tmp_path / "cache"))

    def upload(folder):
        for file in Path(folder).iterdir():
            Bucket().pipe_file(f"{URL}/{file.name}", file.read_bytes())
        return URL

    return upload


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Folders of version 1, and the batches that were read from them when it was the current one."""
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(root, filter="data")
    return root


def prepared(old, name, out, shards):
    """The same rows in about so many shards."""
    template = {"chat": True, "chat_template": str(old / "t.jinja")} if name == "chat" else {}
    found = load_manifest(old / name)
    size = Layout(1).stride + (found.seq_len + 1) * (10 if template else 2) + 20
    rows = -(-found.splits["train"].rows // shards)
    return prepare(
        [str(old / f"{name}.jsonl")],
        out,
        seq_len=found.seq_len,
        held_out_fraction=0.2,
        shard_bytes=rows * size,
        progress=False,
        **template,
    )


def check_batches(old, name, folder, processes=1):
    """Compares what processes read with the golden batches of 4 (8 with several processes) rows."""
    golden = np.load(old / "batches.npz")
    size = 4 if processes == 1 else 8
    per_step, compared = size // 4, 0
    for process in range(processes):
        rows = np.arange(size)[process * size // processes : (process + 1) * size // processes]
        batches = train_batches(folder, batch_size=size, seed=3, rows=rows)
        for step, batch in enumerate(itertools.islice(batches, 12 // per_step)):
            for key, values in batch.items():
                parts = [golden[f"{name}/train/{step * per_step + i}/{key}"] for i in range(per_step)]
                np.testing.assert_array_equal(values, np.concatenate(parts)[rows])
                compared += len(values)
        batches.close()
    keys = {key.rpartition("/")[2] for key in golden if key.startswith(f"{name}/")}
    assert compared == 48 * len(keys)
    for step, batch in enumerate(eval_batches(folder, batch_size=4)):
        for key, values in batch.items():
            np.testing.assert_array_equal(values, golden[f"{name}/held_out/{step}/{key}"])


@pytest.mark.parametrize("name", ["text", "chat"])
def test_old_folders_read_as_they_did(old, name):
    check_batches(old, name, old / name)


def test_damage_in_an_old_folder_names_file_and_row(old, tmp_path):
    (tmp_path / "manifest.json").write_bytes((old / "text" / "manifest.json").read_bytes())
    for split in ("train", "held_out"):
        (tmp_path / f"{split}.array_record").write_bytes((old / "text" / f"{split}.array_record").read_bytes())
    file = tmp_path / "train.array_record"
    content = file.read_bytes()
    file.write_bytes(content[:150] + bytes(b ^ 0xFF for b in content[150:158]) + content[158:])
    rows, damaged = open_rows(tmp_path, "train"), []
    for i in range(len(rows)):
        try:
            rows[i]
        except ConfigError as error:
            assert f"train.array_record, row {i}: damaged (" in str(error)  # noqa: PT017
            damaged.append(i)
    assert 1 <= len(damaged) <= 2
    file.write_bytes(content[:1024] + bytes(len(content) - 1024))  # the index at the end is lost
    with pytest.raises(ConfigError, match=r"train\.array_record: damaged, got 0 rows"):
        open_rows(tmp_path, "train")


@pytest.mark.parametrize(("name", "shards"), [("text", 1), ("text", 3), ("text", 64), ("chat", 3)])
def test_the_order_depends_neither_on_shards_nor_processes_nor_storage(old, tmp_path, bucket, name, shards):
    manifest = prepared(old, name, tmp_path / "new", shards)
    assert len(manifest.splits["train"].shards) == min(shards, manifest.splits["train"].rows)
    assert manifest.fingerprint == load_manifest(old / name).fingerprint  # so runs resume on either
    check_sums(manifest, tmp_path / "new")
    bucket(tmp_path / "new")
    for processes in (1, 2, 8):
        check_batches(old, name, tmp_path / "new", processes)
        check_batches(old, name, local_folder(URL), processes)
    folder = local_folder(URL)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 40_000  # no rows
    copied = local_folder(URL, copy=True)
    for file in (tmp_path / "new").iterdir():
        assert (copied / file.name).read_bytes() == file.read_bytes()
    assert local_folder(URL) == copied != folder  # a copy that is there is used
    assert local_folder(tmp_path / "new") == tmp_path / "new"
    with pytest.raises(ConfigError, match="gs://bucket/new: rows are prepared on a disk"):
        prepare([str(old / "text.jsonl")], "gs://bucket/new", seq_len=8, held_out_fraction=0.3)


@pytest.mark.parametrize("name", ["text", "chat"])
def test_rows_are_written_again_in_other_shards(old, tmp_path, bucket, name):
    """From one shard, also in a bucket, and from an old folder: the files that `prepare` makes in this size."""

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    train = prepared(old, name, tmp_path / "expected", 3).splits["train"]
    size = train.shards[0].rows * Layout(train.row_bytes).stride
    prepared(old, name, tmp_path / "one", 1)
    for i, source in enumerate([tmp_path / "one", bucket(tmp_path / "one")]):
        reshard(source, tmp_path / str(i), size)
        assert content(tmp_path / str(i)) == content(tmp_path / "expected")
    assert main(["data", "shard", str(old / name), "--out", str(tmp_path / "new"), "--shard-bytes", str(size)]) == 0
    check_batches(old, name, tmp_path / "new")
    assert {k: v for k, v in content(tmp_path / "new").items() if not k.endswith(".json")} == {
        k: v for k, v in content(tmp_path / "expected").items() if not k.endswith(".json")
    }
    with pytest.raises(ConfigError, match="new: already holds prepared data; allowed: a new folder"):
        reshard(old / name, tmp_path / "new", size)
    file = tmp_path / "0" / shard_name("train", 1, 3)
    content_of_file = bytearray(file.read_bytes())
    content_of_file[Layout(train.row_bytes).span(2, 1)[0]] ^= 1
    file.write_bytes(content_of_file)
    with pytest.raises(ConfigError, match=r"train-00001-of-00003\.array_record: row 2: damaged"):
        reshard(tmp_path / "0", tmp_path / "damaged", size)
    assert not list(tmp_path.glob("damaged*"))


def test_an_old_folder_in_a_bucket_is_copied(old, tmp_path, bucket, capsys):
    bucket(old / "text")
    check_batches(old, "text", local_folder(URL))
    assert "copying gs://bucket/rows to " in capsys.readouterr().err
    del Bucket.store["/bucket/rows/train.array_record"]
    assert local_folder(URL).is_dir()


def test_a_process_reads_its_own_rows_and_little_else(tmp_path, bucket):
    (tmp_path / "a.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 3_000_000, dtype=np.uint8).tobytes())
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", seq_len=1024, held_out_fraction=0.1, shard_bytes=1 << 20)
    bucket(tmp_path / "out")
    folder = local_folder(URL)
    before = sum(size for _, size in Bucket.read)
    batches = train_batches(folder, batch_size=64, seed=0, rows=slice(8, 16), threads=0)
    for batch in itertools.islice(batches, 10):
        assert batch["tokens"].shape == (8, 1024)
    read = list(Bucket.read)
    for batch in itertools.islice(train_batches(folder, batch_size=64, seed=0, rows=slice(8, 16), threads=0), 10):
        assert batch["tokens"].shape == (8, 1024)
    assert Bucket.read == read  # the rows were kept
    tokens = 10 * 8 * 1025 * 2
    assert tokens <= sum(size for _, size in Bucket.read) - before <= 1.1 * tokens
    local = open_rows(tmp_path / "out", "train")
    local.read(range(100))
    assert local._stored.storage.bytes_read <= 1.1 * 100 * 1025 * 2


def test_a_week_long_index_opens_at_once(tmp_path):
    """10^12 tokens in rows of 2048, two terabytes of shards, of which the rows of some steps are really there."""
    seq_len, layout = 2048, Layout(2049 * 2)
    rows = 10**12 // seq_len
    per_shard = (1 << 30) // layout.stride
    count = -(-rows // per_shard)
    key = hashlib.sha256(b"made up").hexdigest()
    file_bytes = -(-layout.span(0, per_shard)[1] // 65536) * 65536
    shards = tuple(Shard(min(per_shard, rows - i * per_shard), key, file_bytes, key) for i in range(count))
    kinds = {"documents": 1, "text_bytes": 1, "content": "", "row_bytes": layout.row_bytes}
    splits = {
        "train": Split(
            **kinds, tokens=rows * seq_len, rows=rows, file_bytes=1, sha256=shards_sha256(shards), shards=shards
        ),
        "held_out": Split(**kinds, tokens=0, rows=0, file_bytes=0, sha256=shards_sha256(())),
    }
    Manifest(seq_len, "<u2", "bytes", ByteTokenizer.fingerprint, 258, 256, splits, (), 0.0, 0).save(tmp_path)
    assert (tmp_path / "manifest.json").stat().st_size < 1_000_000
    for i in range(count):
        file = tmp_path / shard_name("train", i, count)
        file.touch()
        os.truncate(file, file_bytes)  # takes no space
    order, wanted = row_order(rows, [0, 0]), {}
    for g in range(32):
        number = order[g]
        wanted[g] = np.full(seq_len + 1, number % 60_000, "<u2")
        record = sealed(padded(wanted[g].tobytes(), layout.row_bytes), number % per_shard, bytes.fromhex(key))
        start, end = layout.span(number % per_shard, 1)
        first = 65536 - start % 65536  # bytes up to the header of the next block
        with (tmp_path / shard_name("train", number // per_shard, count)).open("r+b") as file:
            file.seek(start)
            file.write(record[:first])
            file.seek(end - len(record[first:]))
            file.write(record[first:])

    begin, before = time.process_time(), peak_memory()
    batches = list(itertools.islice(train_batches(tmp_path, batch_size=8, seed=0, threads=0), 4))
    assert time.process_time() - begin < 5
    assert peak_memory() - before < 100 << 20
    for g, row in wanted.items():
        np.testing.assert_array_equal(batches[g // 8]["tokens"][g % 8], row[:-1])


def peak_memory():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shown(error_or_log):
    return [line for line in error_or_log.splitlines() if "gs://" in line]


@pytest.fixture
def remote(old, tmp_path, bucket):
    """Rows in three shards in a bucket, of which nothing has been read yet."""
    prepared(old, "text", tmp_path / "new", 3)
    bucket(tmp_path / "new")
    folder = local_folder(URL)
    Bucket.read.clear()
    return folder


def test_errors_are_said_once_and_the_run_goes_on(old, remote, capsys):
    def fail(number):
        if 3 <= number < 12:
            raise OSError("503: try later")

    Bucket.fault = fail
    check_batches(old, "text", remote)
    first, last = shown(capsys.readouterr().err)
    assert "rows: train-0000" in first
    assert "cannot be read (503: try later); trying again for up to 600 s" in first
    assert "gs://bucket/rows: no read is failing any more, after" in last


def test_a_call_that_does_not_return_is_made_again(old, remote, capsys, monkeypatch):
    monkeypatch.setattr(storage, "STALL", 0.3)
    never = threading.Event()
    Bucket.fault = lambda number: never.wait(60) and None if number == 5 else None
    check_batches(old, "text", remote)
    assert "cannot be read (no answer in 0.3 s)" in capsys.readouterr().err
    never.set()


def test_half_an_answer_and_other_rows_are_not_trained_on(old, remote, capsys):
    content = {
        name: Bucket.store[f"/bucket/rows/{shard_name('train', i, 3)}"].getvalue() for i, name in enumerate("abc")
    }
    wrong = {4: content["a"][:40], 5: content["b"][84 : 84 + 78], 9: b"", 13: bytes(78)}
    Bucket.fault = wrong.get
    check_batches(old, "text", remote)
    assert "cannot be read (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files, a, b: files.rm(a), "train-00000-of-00003.array_record: missing"),
        (
            lambda files, a, b: files.pipe_file(a, files.cat_file(b, 0, files.size(b))),
            r"row \d+: damaged .*the manifest",
        ),
        (lambda files, a, b: files.pipe_file(a, files.cat_file(a, 0, 900)), r"got \d+ of \d+ bytes from \d+ on"),
    ],
)
def test_a_file_that_changes_under_a_run_ends_it(remote, change, message):
    files, names = Bucket(), [f"{URL}/{shard_name('train', i, 3)}" for i in range(2)]
    batches = train_batches(remote, batch_size=4, seed=3, threads=1, prefetch=1)
    next(batches)
    change(files, *names)
    stored_rows._cache._rows.clear()
    with pytest.raises(ConfigError, match=message):
        list(itertools.islice(batches, 30))
    with pytest.raises(
        ConfigError, match=r"train-00000-of-00003\.array_record: (missing|damaged|got)|row \d+: damaged"
    ):
        list(itertools.islice(train_batches(local_folder(URL), batch_size=4, seed=3), 30))


def test_the_end_when_storage_stays_away(remote, monkeypatch, capsys):
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    monkeypatch.setattr(storage, "OPEN_PATIENCE", 0.2)
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.05)

    def fail(number):
        raise OSError("503: try later")

    Bucket.fault = fail
    with pytest.raises(StorageError, match=r"train-0000.*cannot be read for 0.2 s \(503: try later\)"):
        next(train_batches(remote, batch_size=4, seed=3))
    assert main(["data", "show", URL]) == RESTART
    assert "cannot be read for 0.2 s (503: try later); is the storage there?" in capsys.readouterr().err


def test_nobody_waits_for_rows_that_are_not_wanted_any_more(remote):
    def fail(number):
        raise OSError("away")

    batches = train_batches(remote, batch_size=4, seed=3)
    next(batches)
    Bucket.fault = fail
    before = threading.active_count()
    begin = time.monotonic()
    batches.close()
    while threading.active_count() > before and time.monotonic() - begin < 100:
        time.sleep(0.01)
    with pytest.raises(StorageError, match="closed"):
        _read_closed(remote)
    assert time.monotonic() - begin < 100  # PATIENCE is 600


def _read_closed(folder):
    rows = open_rows(folder, "train")
    threading.Timer(0.1, rows.close).start()
    rows.read(range(len(rows)))


def test_a_bucket_that_is_not_complete_is_refused(old, tmp_path, bucket):
    prepared(old, "text", tmp_path / "new", 3)
    bucket(tmp_path / "new")
    file = f"{URL}/{shard_name('train', 1, 3)}"
    content = Bucket().cat_file(file, 0, 10**9)
    Bucket().pipe_file(file, content[:-1])
    with pytest.raises(ConfigError, match=r"rows/train-00001-of-00003\.array_record: got \d+ bytes, the manifest says"):
        local_folder(URL)
    Bucket().rm(file)
    with pytest.raises(ConfigError, match=r"rows/train-00001-of-00003\.array_record: missing"):
        local_folder(URL)
    Bucket().pipe_file(file, content[:100] + b"!" + content[101:])
    with pytest.raises(ConfigError, match=r"rows/train-00001-of-00003\.array_record: its checksum differs"):
        local_folder(URL, copy=True)
    assert not list((tmp_path / "cache").glob("*"))
    with pytest.raises(ConfigError, match="gs://bucket/none: nothing prepared there"):
        local_folder("gs://bucket/none")


def test_a_damaged_row_on_a_disk_is_named(old, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "LASTING_PATIENCE", 0.05)
    manifest = prepared(old, "text", tmp_path / "new", 3)
    file = tmp_path / "new" / shard_name("train", 1, 3)
    content, layout = bytearray(file.read_bytes()), Layout(manifest.splits["train"].row_bytes)
    content[layout.span(5, 1)[0] + 3] ^= 1
    file.write_bytes(content)
    rows = open_rows(tmp_path / "new", "train")
    per_shard = manifest.splits["train"].shards[0].rows
    for i in range(len(rows)):
        if i == per_shard + 5:
            with pytest.raises(ConfigError, match=r"train-00001-of-00003\.array_record: row 5: damaged"):
                rows[i]
        else:
            rows[i]
    with pytest.raises(ConfigError, match=r"row 5: damaged"):  # also from Grain's threads
        list(itertools.islice(train_batches(tmp_path / "new", batch_size=16, seed=0), 8))


def test_rows_of_any_length_are_where_they_should_be(tmp_path):
    """Compared with ArrayRecord's own reader, also across the headers of blocks."""
    from array_record.python.array_record_module import ArrayRecordReader

    from mythos_jax.data.row_file import RowFile

    random = np.random.default_rng(0)
    for row_bytes in (1, 2, 115, 116, 4098, 16370, 65512, 70_000):
        file = RowFile(tmp_path, f"r{row_bytes}", row_bytes, 1 << 30)
        rows = [random.bytes(int(random.integers(1, row_bytes + 1))) for _ in range(40)]
        for row in rows:
            file.write(row)
        (shard,) = file.finish()["shards"]
        path = tmp_path / shard_name(f"r{row_bytes}", 0, 1)
        records = ArrayRecordReader(str(path)).read_all()
        assert [record[: int.from_bytes(record[-12:-8], "little")] for record in records] == rows
        layout, content = Layout(row_bytes), path.read_bytes()
        for first, count in [(0, 1), (7, 1), (39, 1), (3, 30), (0, 40)]:
            start, end = layout.span(first, count)
            assert layout.records(content[start:end], first, count) == records[first : first + count]
        assert shard.rows == 40
