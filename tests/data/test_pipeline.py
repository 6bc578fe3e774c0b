"""Rows and batches: the stored stream, document segments, order, processes, evaluation, damaged files."""

import itertools
import json
import threading

import numpy as np
import pytest

from mythos_jax.data.pipeline import eval_batches, open_rows, row_order, train_batches
from mythos_jax.data.prepare import prepare
from mythos_jax.data.rows import TokenRows
from mythos_jax.data.split import is_held_out
from mythos_jax.errors import ConfigError

T = 6
EOD = 256
SOURCE = "sample.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder; the last row of each split is short."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    with open(root / SOURCE, "w") as file:
        for _ in range(30):
            letters = generator.integers(97, 123, generator.integers(3, 15))
            file.write(json.dumps({"text": bytes(letters.tolist()).decode()}) + "\n")
    manifest = prepare([str(root / SOURCE)], root / "out", seq_len=T, held_out_fraction=0.2)
    for split in manifest.splits.values():
        assert split.tokens % T
        assert split.rows > 8
    return root / "out"


@pytest.fixture(scope="module")
def stream(folder):
    """The training stream, computed from the source text alone."""
    texts = [json.loads(line)["text"] for line in (folder.parent / SOURCE).read_text().splitlines()]
    train_texts = [text for i, text in enumerate(texts) if not is_held_out(f"{SOURCE}:{i + 1}", 0.2)]
    return [EOD] + [token for text in train_texts for token in [*text.encode(), EOD]]


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"tokens", "targets", "mask"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_rows_contain_the_stream(folder, stream):
    rows = open_rows(folder, "train")
    assert len(rows) == -(-(len(stream) - 1) // T)
    batch = rows.read(range(len(rows)))
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "mask": "bool",
    }
    assert batch["tokens"][batch["mask"]].tolist() == stream[:-1]
    assert batch["targets"][batch["mask"]].tolist() == stream[1:]
    padding = len(rows) * T - (len(stream) - 1)
    assert padding > 0
    assert batch["mask"].ravel().tolist() == [True] * (len(stream) - 1) + [False] * padding
    assert set(batch["targets"][~batch["mask"]].tolist()) == {EOD}
    assert_equal([rows[3]], [{name: array[3] for name, array in batch.items()}])
    assert rows.read([])["tokens"].shape == (0, T)
    for bad in [-1, len(rows)]:
        with pytest.raises(IndexError, match=f"row {bad} of"):
            rows[bad]


def test_segment_ids_count_the_documents_of_a_row(folder, stream):
    """An end-of-document token belongs to its document as a target, and to the next document as an input."""
    rows = open_rows(folder, "train", document_mask=True)
    batch = rows.read(range(len(rows)))
    document, documents = 0, []  # the document that each target of the stream belongs to
    for target in stream[1:]:
        documents.append(document)
        document += target == EOD
    for i, (segments, mask) in enumerate(zip(batch["segment_ids"], batch["mask"], strict=True)):
        of_row = documents[i * T : (i + 1) * T]
        assert segments[mask].tolist() == [1 + document - of_row[0] for document in of_row]
        assert not segments[~mask].any()
    assert batch["segment_ids"].dtype == np.int32
    assert (batch["segment_ids"].max(1) == 2).sum() > 5
    plain = open_rows(folder, "train").read(range(len(rows)))
    assert_equal([{name: batch[name] for name in plain}], [plain])
    first = next(train_batches(folder, batch_size=8, seed=1, document_mask=True))
    order = row_order(len(rows), seed=1)
    np.testing.assert_array_equal(first["segment_ids"], batch["segment_ids"][[order[g] for g in range(8)]])
    batches = list(eval_batches(folder, "train", batch_size=7, document_mask=True))
    padded = np.concatenate([batch["segment_ids"] for batch in batches])
    np.testing.assert_array_equal(padded[: len(rows)], batch["segment_ids"])
    assert not padded[len(rows) :].any()


@pytest.mark.parametrize("count", [1, 2, 5, 37])
def test_an_epoch_has_each_row_once_and_epochs_differ(count):
    order = row_order(count, seed=3)
    epochs = [tuple(order[e * count + i] for i in range(count)) for e in range(20)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(epochs)) > {1: 0, 2: 1, 5: 10, 37: 19}[count]


def test_seeds_share_no_epochs():
    """In Grain alone, seeds 0 and 1 give the same order, one epoch apart."""
    epochs = {seed: {tuple(row_order(37, seed)[e * 37 + i] for i in range(37)) for e in range(6)} for seed in range(4)}
    assert len(set.union(*epochs.values())) == 24
    assert row_order(37, 2**40)[0] in range(37)


def test_the_order_is_pinned():
    """Runs are resumed under later versions of Grain and NumPy, which must not change the order."""
    for seed in [0, [0, 0]]:  # a run on text, and the first part of a mixture
        order = row_order(10, seed)
        assert [order[i] for i in range(10)] == [5, 8, 9, 7, 4, 2, 1, 0, 3, 6]
        assert [order[i] for i in range(10, 20)] == [6, 9, 4, 8, 0, 7, 3, 2, 1, 5]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40, 2**63 - 1])
def test_the_only_part_of_a_mixture_has_the_order_of_the_text_alone(seed):
    alone, part = row_order(37, seed), row_order(37, [seed, 0])
    assert [alone[i] for i in range(80)] == [part[i] for i in range(80)]


@pytest.mark.parametrize("batch_size", [1, 5, 8, 100])
def test_batch_s_has_entries_sB_to_sB_plus_B(folder, batch_size):
    rows = open_rows(folder, "train")
    order = row_order(len(rows), seed=1)
    steps = 3 * len(rows) // batch_size + 2  # across at least two epoch boundaries
    expected = [rows.read([order[g] for g in range(s * batch_size, (s + 1) * batch_size)]) for s in range(steps)]
    assert_equal(take(train_batches(folder, batch_size=batch_size, seed=1), steps), expected)
    seen = np.concatenate([batch["tokens"] for batch in expected])[: len(rows)]
    assert sorted(map(tuple, seen)) == sorted(map(tuple, rows.read(range(len(rows)))["tokens"]))


def test_order_is_a_function_of_seed_and_step(folder):
    batches = take(train_batches(folder, batch_size=8, seed=0), 20)
    assert_equal(take(train_batches(folder, batch_size=8, seed=0, start_step=7), 13), batches[7:])
    assert_equal(take(train_batches(folder, batch_size=8, seed=0, threads=0), 20), batches)
    assert_equal(take(train_batches(folder, batch_size=8, seed=0, threads=5, prefetch=2), 20), batches)
    other = take(train_batches(folder, batch_size=8, seed=1), 20)
    assert sum(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(batches, other, strict=True)) == 0


def test_processes_read_their_rows_of_the_same_global_batch(folder):
    batches = take(train_batches(folder, batch_size=8, seed=0, start_step=2), 9)
    for parts in [[slice(0, 4), slice(4, 8)], [[0, 2, 5], np.array([1, 3]), [4, 6, 7]]]:
        numbers = np.concatenate([np.arange(8)[part] for part in parts])
        local = [take(train_batches(folder, batch_size=8, seed=0, start_step=2, rows=part), 9) for part in parts]
        joined = [
            {name: np.concatenate([b[name] for b in step]) for name in batches[0]} for step in zip(*local, strict=True)
        ]
        assert_equal(joined, [{name: array[numbers] for name, array in batch.items()} for batch in batches])


def test_only_the_rows_of_the_process_are_read(folder, monkeypatch):
    requests, read = [], TokenRows.read
    monkeypatch.setattr(TokenRows, "read", lambda self, rows: requests.append(list(rows)) or read(self, rows))
    next(train_batches(folder, batch_size=8, seed=0, rows=slice(2, 4), threads=0))
    order = row_order(len(open_rows(folder, "train")), seed=0)
    assert requests == [[order[2], order[3]]]


@pytest.mark.parametrize(("split", "max_rows"), [("held_out", 0), ("train", 0), ("train", 8), ("train", 10)])
def test_evaluation_reads_each_row_once_in_order(folder, split, max_rows):
    rows = open_rows(folder, split)
    count = max_rows or len(rows)
    batches = list(eval_batches(folder, split, batch_size=4, max_rows=max_rows))
    assert len(batches) == -(-count // 4)
    assert {batch[name].shape for batch in batches for name in batch} == {(4, T)}
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert_equal([{name: array[:count] for name, array in joined.items()}], [rows.read(range(count))])
    assert not joined["mask"][count:].any()
    assert set(joined["tokens"][count:].ravel().tolist()) <= {EOD}
    halves = [list(eval_batches(folder, split, batch_size=4, max_rows=max_rows, rows=[i, i + 2])) for i in (0, 1)]
    for i, half in enumerate(halves):
        assert_equal(half, [{name: array[[i, i + 2]] for name, array in batch.items()} for batch in batches])


def test_held_out_is_the_default(folder):
    assert_equal(list(eval_batches(folder, batch_size=3)), list(eval_batches(folder, "held_out", batch_size=3)))


def test_threads_can_share_rows(folder):
    rows = open_rows(folder, "train")
    expected, mismatches = rows.read(range(len(rows)))["tokens"], []

    def read(seed):
        generator = np.random.default_rng(seed)
        for _ in range(100):
            indices = generator.integers(0, len(rows), 5)
            if not np.array_equal(rows.read(indices)["tokens"], expected[indices]):
                mismatches.append(indices)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mismatches


def test_unusable_folders_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="split: got 'test', allowed: train, held_out"):
        open_rows(folder, "test")
    with pytest.raises(ConfigError, match="no such folder"):
        train_batches(tmp_path / "none", batch_size=2, seed=0)
    (tmp_path / "a.txt").write_text("some text")
    prepare([str(tmp_path / "a.txt")], tmp_path / "all", seq_len=4, held_out_fraction=0.0)
    with pytest.raises(ConfigError, match=r"all: held_out has no rows"):
        eval_batches(tmp_path / "all", batch_size=2)
