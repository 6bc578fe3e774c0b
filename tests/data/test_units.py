"""Preparing in parallel and after kills, against one undisturbed run of a single thread."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mythos_jax.data import prepare as prepare_module
from mythos_jax.data import units as units_module
from mythos_jax.data.manifest import verify
from mythos_jax.data.prepare import prepare
from mythos_jax.data.sources import find_inputs
from mythos_jax.data.tokenizer import ByteTokenizer
from mythos_jax.data.units import cut, load_unit
from mythos_jax.errors import ConfigError

ENCODE = ByteTokenizer.encode_batch
ASKED = {"seq_len": 16, "held_out_fraction": 0.2}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """FineWeb-Edu's layout (folders of Parquet files with several row groups), a JSONL file, small and long texts."""
    monkeypatch.setattr(units_module, "UNIT_BYTES", 2000)
    monkeypatch.setattr(units_module, "BATCH_BYTES", 300)
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
    """What is in a prepared folder; where it came from may differ."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix != ".json"
    }


def leftovers(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name)


@pytest.fixture
def undisturbed(corpus, tmp_path):
    manifest = prepare([str(corpus)], tmp_path / "undisturbed", workers=1, **ASKED)
    assert manifest.splits["train"].rows > 500
    assert not leftovers(tmp_path)
    return manifest, files(tmp_path / "undisturbed")


def test_units_are_the_stream(corpus):
    inputs, _ = find_inputs([str(corpus)])
    units = list(cut(inputs, 0))
    assert [unit.number for unit in units] == list(range(len(units)))
    assert len(units) > 10
    assert max(sum(len(p.text.encode()) for p in unit.pieces) for unit in units) < 2000 + 10_000  # long.txt is a piece
    whole = [piece for unit in units for piece in unit.pieces]
    assert sum(len(piece.text.encode()) for piece in whole) == units[-1].text_end
    # Reading goes on from any unit that ends a file, and gives the same units.
    ends = [unit for unit in units if unit.next_input >= 0]
    assert 3 < len(ends) < len(units)
    for unit in ends:
        assert list(cut(inputs, 0, unit.number + 1, unit.next_input, unit.text_end)) == units[unit.number + 1 :]
    for limit in [1, 1999, 2000, 2001, 7777]:
        text = "".join(piece.text for unit in cut(inputs, limit) for piece in unit.pieces)
        expected = "".join(piece.text for piece in whole).encode()[:limit].decode(errors="ignore")
        assert text == expected


@pytest.mark.parametrize("workers", [2, 7])
def test_workers_do_not_matter(corpus, undisturbed, tmp_path, workers):
    manifest = prepare([str(corpus)], tmp_path / "out", workers=workers, **ASKED)
    assert manifest == undisturbed[0]
    assert files(tmp_path / "out") == undisturbed[1]


class Killed(BaseException):
    """As KeyboardInterrupt, but ours."""


def kill_after(monkeypatch, count):
    """Makes tokenising stop dead after so many units; returns the texts handed to the tokenizer."""
    seen = []

    def limited(self, texts):
        if count is not None and len(seen) >= count:
            raise Killed
        seen.append(texts)
        return ENCODE(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", limited)
    return seen


@pytest.mark.parametrize("max_bytes", [0, 20_000])
def test_a_killed_run_goes_on_and_gives_the_same(corpus, tmp_path, monkeypatch, max_bytes):
    asked = ASKED | {"max_bytes": max_bytes}
    expected = prepare([str(corpus)], tmp_path / "undisturbed", workers=1, **asked)
    seen = kill_after(monkeypatch, None)
    prepare([str(corpus)], tmp_path / "counted", workers=1, **asked)
    all_batches, done = len(seen), 0
    for stop in [0, 9, 15, 12]:
        seen = kill_after(monkeypatch, stop)
        with pytest.raises(Killed):
            prepare([str(corpus)], tmp_path / "out", workers=1 + stop % 2, **asked)
        assert not (tmp_path / "out").exists()
        (partial,) = leftovers(tmp_path)
        now = len(list((tmp_path / partial / "units").glob("*.npz")))
        assert now >= done
        done = now
    assert done > 4
    seen = kill_after(monkeypatch, None)
    assert prepare([str(corpus)], tmp_path / "out", workers=2, **asked) == expected
    assert 0 < len(seen) < all_batches - 10  # it did not start over
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert not leftovers(tmp_path)


def test_files_that_are_used_up_are_not_read_again(corpus, tmp_path, monkeypatch):
    kill_after(monkeypatch, 60)
    with pytest.raises(Killed):
        prepare([str(corpus)], tmp_path / "out", workers=1, **ASKED)
    kill_after(monkeypatch, None)
    asked, read = [], units_module.pieces
    monkeypatch.setattr(units_module, "pieces", lambda inputs: asked.append(inputs[0].name) or read(inputs))
    prepare([str(corpus)], tmp_path / "out", workers=1, **ASKED)
    names = [item.name for item in find_inputs([str(corpus)])[0]]
    assert asked == names[-len(asked) :]
    assert 0 < len(asked) < len(names)


def test_damaged_partial_work_is_made_again(corpus, undisturbed, tmp_path, monkeypatch):
    kill_after(monkeypatch, 60)
    with pytest.raises(Killed):
        prepare([str(corpus)], tmp_path / "out", workers=1, **ASKED)
    units = tmp_path / leftovers(tmp_path)[0] / "units"
    kept = sorted(units.glob("*.npz"))
    assert len(kept) > 6
    whole = kept[1].read_bytes()
    middle = len(whole) // 2
    kept[1].write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    kept[2].write_bytes(whole[:100])
    kept[4].unlink()
    (units / "000005.part").write_bytes(b"half a unit")
    seen = kill_after(monkeypatch, None)
    assert prepare([str(corpus)], tmp_path / "out", workers=2, **ASKED) == undisturbed[0]
    assert files(tmp_path / "out") == undisturbed[1]
    made = {text for texts in seen for text in texts}
    again = [made.issuperset(piece.text for piece in unit.pieces) for unit in cut(find_inputs([str(corpus)])[0], 0)]
    assert again[: len(kept)] == [number in (1, 2, 4) for number in range(len(kept))]
    assert all(again[len(kept) :])


def test_every_bit_of_a_unit_is_checked(corpus, tmp_path, monkeypatch):
    kill_after(monkeypatch, 12)
    with pytest.raises(Killed):
        prepare([str(corpus)], tmp_path / "out", workers=1, **ASKED)
    units = tmp_path / leftovers(tmp_path)[0] / "units"
    file = units / "000000.npz"
    whole, good = file.read_bytes(), load_unit(units, 0)
    for place in range(0, len(whole), 41):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        read = load_unit(units, 0)
        assert read is None or all(
            np.array_equal(getattr(read, name), getattr(good, name)) for name in vars(good)
        )  # a bit of the container that says nothing


def test_changed_sources_start_over_and_stale_work_is_deleted(corpus, tmp_path, monkeypatch):
    kill_after(monkeypatch, 20)
    with pytest.raises(Killed):
        prepare([str(corpus)], tmp_path / "out", workers=1, **ASKED)
    (stale,) = leftovers(tmp_path)
    (tmp_path / "other.partial-123456").mkdir()  # another's
    (corpus / "small00.txt").write_text("changed")
    with pytest.raises(Killed):
        prepare([str(corpus)], tmp_path / "out", workers=1, **ASKED)
    assert len(leftovers(tmp_path)) == 2
    assert stale not in leftovers(tmp_path)
    kill_after(monkeypatch, None)
    changed = prepare([str(corpus)], tmp_path / "out", workers=1, **ASKED)
    assert changed == prepare([str(corpus)], tmp_path / "fresh", workers=1, **ASKED)
    assert leftovers(tmp_path) == ["other.partial-123456"]


def test_work_in_progress_is_left_alone(corpus, undisturbed, tmp_path, monkeypatch):
    """Two at once on the same: neither disturbs the other, whoever is first wins."""
    settle = prepare_module._settle

    def other_first(partial, out, manifest):
        monkeypatch.setattr(prepare_module, "_settle", settle)
        assert prepare([str(corpus)], out, **ASKED) == undisturbed[0]
        assert (partial / "manifest.json").exists()
        return settle(partial, out, manifest)

    monkeypatch.setattr(prepare_module, "_settle", other_first)
    assert prepare([str(corpus)], tmp_path / "out", **ASKED) == undisturbed[0]
    assert not leftovers(tmp_path)


def test_a_finished_folder_is_not_made_again(corpus, undisturbed, tmp_path, monkeypatch):
    kill_after(monkeypatch, 0)
    assert prepare([str(corpus)], tmp_path / "undisturbed", **ASKED) == undisturbed[0]


def test_what_was_written_is_read_back(corpus, tmp_path, monkeypatch):
    close = prepare_module.RowWriter._close

    def damaging(self):
        close(self)
        data = self.path.read_bytes()
        middle = len(data) // 2
        self.path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])

    monkeypatch.setattr(prepare_module.RowWriter, "_close", damaging)
    with pytest.raises(ConfigError, match=r"train\.array_record: (reads back other rows|cannot be read back)"):
        prepare([str(corpus)], tmp_path / "out", **ASKED)
    assert not (tmp_path / "out").exists()


def test_a_process_killed_at_any_time(tmp_path):
    """SIGKILL, from outside, at four moments."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(bytes(random.integers(97, 123, 100_000).tolist()).decode())
    code = (
        "import sys, time\n"
        "from mythos_jax.data import units\n"
        "from mythos_jax.data.tokenizer import ByteTokenizer\n"
        "units.UNIT_BYTES = 100_000\n"
        "encode = ByteTokenizer.encode_batch\n"
        "ByteTokenizer.encode_batch = lambda self, texts: (time.sleep(0.02), encode(self, texts))[1]\n"
        "from mythos_jax.data.prepare import prepare\n"
        "print('ready', flush=True)\n"
        "prepare([sys.argv[1]], sys.argv[2], seq_len=64, held_out_fraction=0.1, "
        "workers=int(sys.argv[3]), progress=False)\n"
    )

    def start(out, workers):
        command = [sys.executable, "-c", code, str(folder), str(out), str(workers)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        return process

    assert start(tmp_path / "undisturbed", 1).wait() == 0
    most = 0
    for wait in [0.1, 0.3, 0.3, 0.3]:
        process = start(tmp_path / "out", 2)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(leftovers(tmp_path)) <= 1
        most = max(most, len(list(tmp_path.glob("out.partial-*/units/*.npz"))))
    assert most > 3
    assert start(tmp_path / "out", 2).wait() == 0
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert verify(tmp_path / "out") == verify(tmp_path / "undisturbed")
    assert not leftovers(tmp_path)
