"""Preparing in parallel and after kills, compared with an uninterrupted run of a single thread."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mythos_jax.data import text_parts as text_parts_module
from mythos_jax.data import units as units_module
from mythos_jax.data import work_folder as work_folder_module
from mythos_jax.data.destination import Destination
from mythos_jax.data.input_file import InputFile
from mythos_jax.data.manifest import check_sums, load_manifest
from mythos_jax.data.prepare import prepare
from mythos_jax.data.rows import RowWriter
from mythos_jax.data.sources import find_inputs
from mythos_jax.data.text_parts import TextStream, cut_units
from mythos_jax.data.tokenizer import ByteTokenizer
from mythos_jax.data.units import load_unit
from mythos_jax.data.work_files import WorkFiles
from mythos_jax.errors import ConfigError

ENCODE = ByteTokenizer.encode_batch
OPTIONS = {"seq_len": 16, "held_out_fraction": 0.2}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """FineWeb-Edu's layout (folders of Parquet files with several row groups), a JSONL file, small and long texts."""
    monkeypatch.setattr(text_parts_module, "UNIT_BYTES", 2000)
    monkeypatch.setattr(units_module, "ENCODE_BYTES", 300)
    random = np.random.default_rng(0)

    def text(letters):
        return bytes(random.integers(97, 123, int(letters)).tolist()).decode() + " é日\n"

    root = tmp_path / "corpus"
    for dump in ["CC-MAIN-2024-10", "CC-MAIN-2024-18"]:
        for shard in range(2):
            texts = [text(n) for n in random.integers(0, 300, 40)]
            table = pyarrow.table(
                {
                    "text": texts,
                    "id": [f"<urn:uuid:{i}>" for i in range(40)],
                    "dump": [dump] * 40,
                    "url": ["https://example.org"] * 40,
                    "score": random.random(40),
                }
            )
            file = root / "data" / dump / f"train-{shard:05}-of-00002.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(table, file, row_group_size=7)
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": text(50)}) + "\n" for _ in range(90)))
    (root / "long.txt").write_text("".join(text(60) for _ in range(100)))
    for i in range(30):
        (root / f"small{i:02}.txt").write_text(text(70))
    return root


def files(folder):
    """Hashes of the files in a prepared folder, without the manifest, which names the sources."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix != ".json"
    }


def leftovers(tmp_path):
    """The names of the work folders."""
    return sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name)


@pytest.fixture
def uninterrupted(corpus, tmp_path):
    manifest = prepare([str(corpus)], tmp_path / "uninterrupted", workers=1, **OPTIONS)
    assert manifest.splits["train"].rows > 500
    assert not leftovers(tmp_path)
    return manifest, files(tmp_path / "uninterrupted")


def units_of(stream):
    """The units of each part, read from the start of the stream."""
    before = 0
    for number, inputs in enumerate(stream.groups()):
        part = stream.part(number, inputs, before)
        if part is not None:
            yield list(cut_units(part))
            before += text_parts_module.text_bytes(part)


def test_units_contain_the_stream(corpus):
    inputs = find_inputs([str(corpus)]).files
    stream = TextStream(inputs)
    parts = list(units_of(stream))
    assert [file for group in stream.groups() for file in group] == inputs
    assert [[unit.number for unit in units] for units in parts] == [list(range(len(units))) for units in parts]
    assert [[unit.last for unit in units] for units in parts] == [[False] * (len(u) - 1) + [True] for u in parts]
    units = [unit for units in parts for unit in units]
    assert 5 < len(parts) < len(inputs) < len(units) + 20
    assert max(sum(len(p.text.encode()) for p in unit.pieces) for unit in units) < 2000 + 10_000  # long.txt is a piece
    text = "".join(piece.text for unit in units for piece in unit.pieces).encode()
    assert len(text) == sum(units[-1].text_end for units in parts)
    for limit in [1, 1999, 2000, 2001, 7777, 30_000]:
        limited = units_of(dataclasses.replace(stream, max_bytes=limit))
        pieces = [piece.text for units in limited for unit in units for piece in unit.pieces]
        assert "".join(pieces) == text[:limit].decode(errors="ignore")


def test_many_small_files_are_grouped_at_once():
    files = [*[InputFile(Path("a"), "a", 0)] * 40_000, *[InputFile(Path("a"), "a", 1 << 10)] * 40_000]
    begin = time.process_time()
    groups = list(TextStream(files).groups())
    assert time.process_time() - begin < 2  # about 0.02 s; many seconds if all of a group is added up for each file
    assert [file for group in groups for file in group] == files
    assert [len(group) for group in groups] == [1 << 14] * 4 + [80_000 - (4 << 14)]
    last = [InputFile(Path("b"), "b", 1 << 30)] * 2
    assert [len(group) for group in TextStream([*files[:9], *last]).groups()] == [10, 1]


@pytest.mark.parametrize("workers", [2, 7])
def test_the_result_does_not_depend_on_the_number_of_workers(corpus, uninterrupted, tmp_path, workers):
    manifest = prepare([str(corpus)], tmp_path / "out", workers=workers, **OPTIONS)
    assert manifest == uninterrupted[0]
    assert files(tmp_path / "out") == uninterrupted[1]


class Killed(BaseException):
    """Stops `prepare` as KeyboardInterrupt does."""


def kill_after(monkeypatch, count):
    """Raises `Killed` after `count` calls of the tokenizer (None: never). Returns the texts passed to it, per call."""
    calls = []

    def limited(self, texts):
        if count is not None and len(calls) >= count:
            raise Killed
        calls.append(texts)
        return ENCODE(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", limited)
    return calls


def killed_run(corpus, tmp_path, monkeypatch, calls):
    """The folder of units that a run killed after `calls` calls of the tokenizer leaves behind."""
    kill_after(monkeypatch, calls)
    with pytest.raises(Killed):
        prepare([str(corpus)], tmp_path / "out", workers=1, **OPTIONS)
    (work_folder,) = leftovers(tmp_path)
    return tmp_path / work_folder / "units"


@pytest.mark.parametrize("max_bytes", [0, 20_000])
def test_a_killed_run_resumes_and_gives_the_same_result(corpus, tmp_path, monkeypatch, max_bytes):
    options = OPTIONS | {"max_bytes": max_bytes}
    expected = prepare([str(corpus)], tmp_path / "uninterrupted", workers=1, **options)
    calls = kill_after(monkeypatch, None)
    prepare([str(corpus)], tmp_path / "counted", workers=1, **options)
    all_calls, units_stored = len(calls), 0
    for stop in [0, 9, 15, 12]:
        kill_after(monkeypatch, stop)
        with pytest.raises(Killed):
            prepare([str(corpus)], tmp_path / "out", workers=1 + stop % 2, **options)
        assert not (tmp_path / "out").exists()
        (work_folder,) = leftovers(tmp_path)
        stored_now = len(list((tmp_path / work_folder / "units").glob("*.npz")))
        assert stored_now >= units_stored
        units_stored = stored_now
    assert units_stored > 4
    calls = kill_after(monkeypatch, None)
    assert prepare([str(corpus)], tmp_path / "out", workers=2, **options) == expected
    assert 0 < len(calls) < all_calls - 10  # it did not start over
    assert files(tmp_path / "out") == files(tmp_path / "uninterrupted")
    assert not leftovers(tmp_path)


def test_completed_files_are_not_read_again(corpus, tmp_path, monkeypatch):
    killed_run(corpus, tmp_path, monkeypatch, calls=60)
    kill_after(monkeypatch, None)
    files_read, read_pieces = [], text_parts_module.read_pieces
    monkeypatch.setattr(
        text_parts_module,
        "read_pieces",
        lambda inputs, reading: files_read.extend(file.name for file in inputs) or read_pieces(inputs, reading),
    )
    prepare([str(corpus)], tmp_path / "out", workers=1, **OPTIONS)
    names = [file.name for file in find_inputs([str(corpus)]).files]
    assert files_read == names[-len(files_read) :]
    assert 0 < len(files_read) < len(names)


def test_damaged_units_are_made_again(corpus, uninterrupted, tmp_path, monkeypatch):
    units = killed_run(corpus, tmp_path, monkeypatch, calls=60)
    stored = sorted(units.glob("*.npz"))
    assert len(stored) > 6
    content = stored[1].read_bytes()
    middle = len(content) // 2
    stored[1].write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    stored[2].write_bytes(content[:100])
    stored[4].unlink()
    (units / "000005-000000.npz.part").write_bytes(b"half a unit")
    calls = kill_after(monkeypatch, None)
    assert prepare([str(corpus)], tmp_path / "out", workers=2, **OPTIONS) == uninterrupted[0]
    assert files(tmp_path / "out") == uninterrupted[1]
    tokenized = {text for texts in calls for text in texts}
    all_units = [unit for units in units_of(TextStream(find_inputs([str(corpus)]).files)) for unit in units]
    made_again = [tokenized.issuperset(piece.text for piece in unit.pieces) for unit in all_units]
    assert made_again[: len(stored)] == [number in (1, 2, 4) for number in range(len(stored))]
    assert all(made_again[len(stored) :])


def test_every_bit_of_a_unit_is_checked(corpus, tmp_path, monkeypatch):
    units = killed_run(corpus, tmp_path, monkeypatch, calls=12)
    file, stored = units / "000000-000000.npz", WorkFiles(units)
    content, undamaged = file.read_bytes(), load_unit(stored, 0, 0)
    for i in range(0, len(content), 41):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        loaded = load_unit(stored, 0, 0)
        assert loaded is None or all(
            np.array_equal(getattr(loaded, name), getattr(undamaged, name)) for name in vars(undamaged)
        )  # equal where the container does not use the bit


def test_abandoned_work_of_another_request_is_deleted(corpus, tmp_path, monkeypatch):
    abandoned = killed_run(corpus, tmp_path, monkeypatch, calls=20).parent
    (tmp_path / "other.partial-123456").mkdir()  # of another output folder
    monkeypatch.setattr(ByteTokenizer, "fingerprint", "another")
    with pytest.raises(Killed):
        prepare([str(corpus)], tmp_path / "out", workers=1, **OPTIONS)
    assert len(leftovers(tmp_path)) == 2
    assert not abandoned.exists()


def test_after_a_change_of_the_sources_only_what_has_changed_is_tokenized(corpus, tmp_path, monkeypatch):
    killed_run(corpus, tmp_path, monkeypatch, calls=60)
    (corpus / "lines.jsonl").write_text((corpus / "lines.jsonl").read_text() + json.dumps({"text": "one more"}) + "\n")
    (corpus / "zzz.txt").write_text("another file")
    calls = kill_after(monkeypatch, None)
    changed = prepare([str(corpus)], tmp_path / "out", workers=1, **OPTIONS)
    resumed_calls = len(calls)
    assert changed == prepare([str(corpus)], tmp_path / "fresh", workers=1, **OPTIONS)
    assert 0 < resumed_calls < (len(calls) - resumed_calls) / 2
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert not leftovers(tmp_path)


def test_a_broken_line_stops_and_keeps_what_was_done(corpus, tmp_path, monkeypatch):
    """The corrected file goes on from there; so does a run that skips the line; both as if it had never stopped."""
    lines = (corpus / "lines.jsonl").read_text().splitlines(keepends=True)
    good = "".join(lines)
    (corpus / "lines.jsonl").write_text("".join(lines[:80]) + "{broken\n" + "".join(lines[80:]))
    calls = kill_after(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"lines\.jsonl, line 81: not JSON; `mythos data prepare --on-error skip`"):
        prepare([str(corpus)], tmp_path / "out", workers=2, **OPTIONS)
    done = len(calls)
    (work_folder,) = leftovers(tmp_path)
    stored = WorkFiles(tmp_path / work_folder / "units")
    kept = [load_unit(stored, 0, i) for i in range(done)]
    assert sum(unit is not None for unit in kept) == 2
    copy = tmp_path / work_folder.replace("out.", "skip.")
    shutil.copytree(tmp_path / work_folder, copy)
    del calls[:]
    skipped = prepare([str(corpus)], tmp_path / "skip", workers=2, on_error="skip", **OPTIONS)
    assert skipped.left_out_count == 1
    assert skipped.left_out[0].endswith("lines.jsonl, line 81: not JSON")
    resumed = len(calls)
    assert skipped == prepare([str(corpus)], tmp_path / "skip_fresh", workers=1, on_error="skip", **OPTIONS)
    assert files(tmp_path / "skip") == files(tmp_path / "skip_fresh")
    assert resumed + done <= len(calls) - resumed + 5  # at most the unit with the broken line was made in vain
    with pytest.raises(ConfigError, match="line 81: not JSON"):  # what a skipping run made does not hide the error
        prepare([str(corpus)], tmp_path / "out", workers=1, **OPTIONS)
    (corpus / "lines.jsonl").write_text(good)
    del calls[:]
    corrected = prepare([str(corpus)], tmp_path / "out", workers=2, **OPTIONS)
    resumed = len(calls)
    assert corrected == prepare([str(corpus)], tmp_path / "fresh", workers=1, **OPTIONS)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert resumed + done <= len(calls) - resumed + 5
    assert not corrected.left_out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_does_not_wait_for_the_tokenizer(tmp_path, number):
    """The tokenizer is in a call of an hour that does not look at signals; the exit code is as documented."""
    (tmp_path / "a.txt").write_text("text")
    code = (
        "import signal, subprocess, sys\n"
        "from mythos_jax.cli import main\n"
        "from mythos_jax.data.tokenizer import ByteTokenizer\n"
        "def encode(self, texts):\n"
        "    print('tokenizing', flush=True)\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])\n"
        "    subprocess.run(['sleep', '3600'])\n"
        "ByteTokenizer.encode_batch = encode\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))  # as `mythos train` does\n"
        "sys.exit(main(['data', 'prepare', sys.argv[1], '--out', sys.argv[2]]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout.readline() == "tokenizing\n"
    process.send_signal(number)
    try:  # it takes about 1.2 s on an idle machine
        assert process.wait(timeout=100) == {signal.SIGINT: 130, signal.SIGTERM: 42}[number]
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # `sleep`


def test_work_in_progress_is_left_alone(corpus, uninterrupted, tmp_path, monkeypatch):
    """Two processes with the same request do not disturb each other; the first to finish provides the result."""
    publish = Destination.publish

    def run_other(self, rows, manifest):
        monkeypatch.setattr(Destination, "publish", publish)
        assert prepare([str(corpus)], self.out, **OPTIONS) == uninterrupted[0]
        assert list(Path(rows).glob("train-*"))
        return publish(self, rows, manifest)

    monkeypatch.setattr(Destination, "publish", run_other)
    assert prepare([str(corpus)], tmp_path / "out", **OPTIONS) == uninterrupted[0]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("moment", ["before it is locked", "when it is locked"])
def test_a_folder_that_is_deleted_by_its_last_owner(corpus, uninterrupted, tmp_path, monkeypatch, moment):
    acquire = work_folder_module.FileLock.acquire

    def delete_first(self, **options):
        monkeypatch.setattr(work_folder_module.FileLock, "acquire", acquire)
        folder = Path(self.lock_file).parent
        if moment == "before it is locked":
            shutil.rmtree(folder)
            return acquire(self, **options)
        acquired = acquire(self, **options)
        shutil.rmtree(folder)
        return acquired

    monkeypatch.setattr(work_folder_module.FileLock, "acquire", delete_first)
    assert prepare([str(corpus)], tmp_path / "out", **OPTIONS) == uninterrupted[0]
    assert not leftovers(tmp_path)


def test_a_new_folder_is_not_taken_for_an_abandoned_one(tmp_path, monkeypatch):
    """Another process looks for abandoned work at the worst moment: the folder has been made and is not yet locked."""
    acquire, own_folder = work_folder_module.FileLock.acquire, work_folder_module._own_folder

    def look_first(self, **options):
        monkeypatch.setattr(work_folder_module.FileLock, "acquire", acquire)
        (Path(self.lock_file).parent / "lock").touch()
        work_folder_module._delete_abandoned(tmp_path / "out", tmp_path / "another")
        return acquire(self, **options)

    def looked_for(folder):
        names = own_folder(folder)
        monkeypatch.setattr(work_folder_module.FileLock, "acquire", look_first)
        return names

    monkeypatch.setattr(work_folder_module, "_own_folder", looked_for)
    with (
        work_folder_module.work_folder(tmp_path / "out", "same") as first,
        work_folder_module.work_folder(tmp_path / "out", "same") as second,
    ):
        assert first.is_dir()
        assert second.is_dir()
        assert first != second
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "no flock"), NotImplementedError("no flock")])
def test_a_file_system_without_locks(corpus, uninterrupted, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(work_folder_module.FileLock, "acquire", fail)
    assert prepare([str(corpus)], tmp_path / "out", **OPTIONS) == uninterrupted[0]
    assert files(tmp_path / "out") == uninterrupted[1]


def test_a_finished_folder_is_not_made_again(corpus, uninterrupted, tmp_path, monkeypatch):
    kill_after(monkeypatch, 0)
    assert prepare([str(corpus)], tmp_path / "uninterrupted", **OPTIONS) == uninterrupted[0]


def test_what_was_written_is_read_back(corpus, tmp_path, monkeypatch):
    write = RowWriter._write_records

    def write_and_damage(self, path, key):
        write(self, path, key)
        content = bytearray(path.read_bytes())
        content[self.layout.span(0, 1)[0]] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(RowWriter, "_write_records", write_and_damage)
    with pytest.raises(ConfigError, match=r"train-00000\.array_record: the rows read back differ"):
        prepare([str(corpus)], tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def start(tmp_path):
    """Starts `prepare` of 4 MB of text, in about 40 units, in `count` processes at once: start(out, workers, count).

    While the file `hold` is there, they stand still when so many units are stored as it says."""
    folder = tmp_path / "text"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(bytes(random.integers(97, 123, 100_000).tolist()).decode())
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mythos_jax.data import text_parts\n"
        "from mythos_jax.data.tokenizer import ByteTokenizer\n"
        "text_parts.UNIT_BYTES = 100_000\n"
        "encode = ByteTokenizer.encode_batch\n"
        "def slowly(self, texts):\n"
        "    time.sleep(0.05)\n"
        "    while is_held():\n"
        "        time.sleep(0.01)\n"
        "    return encode(self, texts)\n"
        "def is_held():\n"
        "    stored = len(list(Path(out).parent.glob('out.partial-*/units/*.npz')))\n"
        "    try:\n"
        "        return stored >= int(hold.read_text())\n"
        "    except FileNotFoundError:\n"
        "        return False\n"
        "ByteTokenizer.encode_batch = slowly\n"
        "from mythos_jax.data.prepare import prepare\n"
        "source, out, workers = sys.argv[1:]\n"
        "hold = Path(out).parent / 'hold'\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
        "prepare([source], out, seq_len=64, held_out_fraction=0.1, workers=int(workers), progress=False)\n"
    )

    def start(out, workers, count=1):
        command = [sys.executable, "-c", code, str(folder), str(out), str(workers)]
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            process.stdin.close()
        return processes

    return start


def check_same(folder, other):
    manifest = load_manifest(folder)
    assert manifest == load_manifest(other)
    check_sums(manifest, folder)
    check_sums(manifest, other)


def units_stored(tmp_path):
    return len(list(tmp_path.glob("out.partial-*/units/*.npz")))


@pytest.mark.slow
def test_a_process_killed_at_any_time(tmp_path, start):
    """SIGKILL, when 0, 2, 4 and 7 of about 40 units are stored."""
    assert start(tmp_path / "uninterrupted", 1)[0].wait() == 0
    for count in [0, 2, 4, 7]:
        (tmp_path / "hold").write_text(str(count + 9))
        (process,) = start(tmp_path / "out", 2)
        while units_stored(tmp_path) < count and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(leftovers(tmp_path)) <= 1
        assert units_stored(tmp_path) >= count
    (tmp_path / "hold").unlink()
    assert start(tmp_path / "out", 2)[0].wait() == 0
    assert files(tmp_path / "out") == files(tmp_path / "uninterrupted")
    check_same(tmp_path / "out", tmp_path / "uninterrupted")
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_three_processes_at_once(tmp_path, start):
    """One is killed, the others succeed, and there is one folder."""
    assert start(tmp_path / "uninterrupted", 1)[0].wait() == 0
    (tmp_path / "hold").write_text("9")
    processes = start(tmp_path / "out", 2, count=3)
    while not units_stored(tmp_path):
        time.sleep(0.01)
    os.kill(processes[0].pid, signal.SIGKILL)
    (tmp_path / "hold").unlink()
    assert [process.wait() for process in processes] == [-signal.SIGKILL, 0, 0]
    check_same(tmp_path / "out", tmp_path / "uninterrupted")
    assert start(tmp_path / "out", 1)[0].wait() == 0  # finds the data, and does nothing
