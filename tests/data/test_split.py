"""What is held out when hashes of names alone would leave a split empty, and of a single document."""

import gzip
import json

import numpy as np
import pytest

from mythos_jax.data import readers as readers_module
from mythos_jax.data import text_parts as text_parts_module
from mythos_jax.data.prepare import prepare
from mythos_jax.data.readers import Reading
from mythos_jax.data.rows import TokenRows
from mythos_jax.data.sources import find_inputs
from mythos_jax.data.split import find_division, is_held_out
from mythos_jax.data.tokenizer import ByteTokenizer
from mythos_jax.errors import ConfigError


def texts(folder, split):
    """The documents in the rows of a split, decoded."""
    rows = TokenRows(folder, split)
    batch = rows.read(range(len(rows)))
    targets = batch["targets"][batch["mask"]]
    ends = np.flatnonzero(targets == 256)
    return [bytes(part[part < 256].tolist()).decode() for part in np.split(targets, ends + 1)[:-1]]


def prepared(tmp_path, source, fraction, **options):
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    manifest = prepare([str(source)], out, seq_len=8, held_out_fraction=fraction, progress=False, **options)
    assert [manifest.splits[s].documents for s in ("train", "held_out")] == [
        len(texts(out, "train")),
        len(texts(out, "held_out")),
    ]
    for split in ("train", "held_out"):
        assert manifest.splits[split].text_bytes == len("".join(texts(out, split)).encode())
    return texts(out, "train"), texts(out, "held_out")


def position(name):
    """Where a name is between 0 and 1; it is held out by fractions above that."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if is_held_out(name, middle) else (middle, high)
    return low


@pytest.mark.parametrize("kind", ["files", "jsonl"])
@pytest.mark.parametrize("count", [2, 5, 22])
def test_of_several_documents_each_side_has_one(tmp_path, capsys, kind, count):
    if kind == "files":
        source = tmp_path / "text"
        source.mkdir()
        names = {f"{i:02}.txt": f"document {i}" for i in range(count)}
        for name, text in names.items():
            (source / name).write_text(text)
    else:
        source = tmp_path / "a.jsonl"
        names = {f"a.jsonl:{i + 1}": f"document {i}" for i in range(count)}
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in names.values()))
    order = sorted(names, key=position)
    for fraction, held_out, said in [
        (position(order[0]) * 0.99, order[:1], "to be held out"),  # none by their hashes
        (position(order[0]) * 1.01, order[:1], ""),
        (position(order[-1]) * 0.999, order[:-1], ""),
        (position(order[-1]) * 1.001, order[:-1], "to be trained on"),  # all by their hashes
    ]:
        train, held = prepared(tmp_path, source, fraction)
        assert held == [names[name] for name in names if name in held_out]
        assert train == [names[name] for name in names if name not in held_out]
        printed = capsys.readouterr().err
        assert said in printed if said else not printed
    assert prepared(tmp_path, source, 0.0) == (list(names.values()), [])


def test_documents_of_one_name(tmp_path):
    for folder in "abc":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(folder)
    sources = [str(tmp_path / folder) for folder in "abc"]
    for fraction, expected in [(0.0001, (["b", "c"], ["a"])), (0.9999, (["a"], ["b", "c"]))]:
        out = tmp_path / str(fraction)
        prepare(sources, out, seq_len=8, held_out_fraction=fraction, progress=False)
        assert (texts(out, "train"), texts(out, "held_out")) == expected


LINES = "".join(f"line {i} é\n" for i in range(100))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_the_only_document_is_divided_at_a_line(tmp_path, capsys, name, fraction):
    content = {"a.jsonl": json.dumps({"text": LINES}), "a.json": json.dumps([{"text": None}, LINES])}.get(name, LINES)
    data = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
    (tmp_path / name).write_bytes(data)
    (train,), (held_out,) = prepared(tmp_path, tmp_path / name, fraction)
    assert train + held_out == LINES
    assert train.endswith("\n")
    longest = len("line 99 é\n".encode())
    assert 0 <= len(held_out.encode()) - round(len(LINES.encode()) * fraction) < longest
    document = name + {"a.jsonl": ":1", "a.json": ":2"}.get(name, "")
    said = f"{document} is the only document; its last {len(held_out.encode()):,} bytes ({fraction}) are held out\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("text", "fraction", "train"),
    [
        ("é日", 0.05, "é"),
        ("ab", 0.9999, "a"),
        ("日本語" * 20, 0.5, "日本語" * 10),  # no line ends
        ("a\n" + "b" * 998, 0.1, "a\n" + "b" * 898),  # the line is longer than the share
        ("x\n" * 50, 0.5, "x\n" * 25),
        ("\n\n\n\n", 0.25, "\n\n\n"),
    ],
)
def test_where_a_document_is_divided(tmp_path, text, fraction, train):
    (tmp_path / "a.txt").write_text(text)
    assert prepared(tmp_path, tmp_path / "a.txt", fraction) == ([train], [text[len(train) :]])


def test_with_max_bytes_the_text_that_is_read_is_divided(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "b.txt").write_text("never read")
    (train,), (held_out,) = prepared(tmp_path, tmp_path / "a.txt", 0.2, max_bytes=400)
    assert (train + held_out).encode() == LINES.encode()[:400]
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    inputs = find_inputs(sources).files
    size = len(LINES.encode())
    for limit, single in [(size - 1, True), (size, True), (size + 1, False), (0, False)]:
        assert (find_division(inputs, Reading(), limit, 0.1) is not None) == single, limit
    assert find_division(inputs[:1], Reading(), 0, 0.0) is None


def test_a_long_document_is_divided_in_the_same_way_by_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_module, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(text_parts_module, "UNIT_BYTES", 200)
    (tmp_path / "a.txt").write_text(LINES)

    def run(out, **options):
        options = {"seq_len": 8, "held_out_fraction": 0.3, "workers": 1} | options
        return prepare([str(tmp_path / "a.txt")], tmp_path / out, **options)

    assert run("w1").fingerprint == run("w3", workers=3).fingerprint
    (train,), (held_out,) = texts(tmp_path / "w1", "train"), texts(tmp_path / "w1", "held_out")
    assert train + held_out == LINES
    assert train.endswith("\n")
    # Stopped in the middle, and then with another fraction: what does not change is not tokenized again.
    encode, calls = ByteTokenizer.encode_batch, []

    def limited(self, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise ConfigError("stopped")
        return encode(self, batch)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", limited)
    with pytest.raises(ConfigError, match="stopped"):
        run("again")
    assert run("again", held_out_fraction=0.25).fingerprint == run("fresh", held_out_fraction=0.25).fingerprint
    assert run("w1").fingerprint != run("fresh", held_out_fraction=0.25).fingerprint
    first = LINES[:30]
    assert sum(batch[0].startswith(first) for batch in calls) == 2  # in the stopped run and in the fresh one


def test_a_document_of_one_character(tmp_path):
    (tmp_path / "a.txt").write_text("é")
    with pytest.raises(ConfigError, match=r"^held_out_fraction: got 0\.1, and the only document has one character"):
        prepared(tmp_path, tmp_path / "a.txt", 0.1)
    assert prepared(tmp_path, tmp_path / "a.txt", 0.0) == (["é"], [])
