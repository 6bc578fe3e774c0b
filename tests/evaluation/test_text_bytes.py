"""Bits per byte are of the bytes that were measured: those of the rows, counted by hand."""

from pathlib import Path

import numpy as np
import pytest

from mythos_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, ModelConfig
from mythos_jax.data.manifest import Manifest, load_manifest
from mythos_jax.data.pipeline import eval_batches, open_rows
from mythos_jax.data.row_file import TokenPiece
from mythos_jax.data.rows import RowWriter
from mythos_jax.data.tokenizer import Tokenizer, load_tokenizer
from mythos_jax.evaluation.evaluate import held_out_batches
from mythos_jax.evaluation.text_bytes import measured_bytes, row_bytes
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel
from mythos_jax.runs.trained_on import TrainedOn
from mythos_jax.sharding import make_mesh
from tests import tokenizer_kinds
from tests.chats import dialogue, prepare

SEQ_LEN = 16
ENGLISH = [f"Document {i}: the quick brown fox jumps over the lazy dog {i} times." for i in range(12)]
CHINESE = [f"我们都是学生。今日は天気が良いです。{i} 🙂👍🏽" for i in range(30)]
RARE = [f"鳳凰翱翔鱗鬱麒麟 {i}" for i in range(60)]  # of which the tokenizer knows the bytes only


def prepared(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    """A prepared folder with these documents held out, in this order."""
    folder.mkdir()
    splits = {}
    for name, documents in [("train", ["a"]), ("held_out", texts)]:
        writer = RowWriter(folder, name, SEQ_LEN, "<u2", tokenizer.end_of_document)
        for text in documents:
            writer.add(TokenPiece(tokenizer.encode(text), len(text.encode()), begins=True))
        splits[name] = writer.close()
    Manifest(
        seq_len=SEQ_LEN,
        dtype="<u2",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        splits=splits,
        sources=("text",),
        held_out_fraction=0.5,
        max_bytes=0,
    ).save(folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("kind", tokenizer_kinds.LOSSLESS)
def test_rows_have_the_bytes_of_their_documents(kind, tmp_path):
    """At the end of every row: those of the documents so far, the last of which may go on."""
    tokenizer = load_tokenizer(tokenizer_kinds.save(kind, tmp_path))
    texts = [text for pair in zip(ENGLISH, CHINESE, strict=False) for text in pair]
    prepared(tmp_path / "data", tokenizer, texts)
    rows = open_rows(tmp_path / "data", "held_out")
    end = tokenizer.end_of_document
    stream = [token for text in texts for token in [end, *tokenizer.encode(text).tolist()]]
    counted, exact = 0, 0
    for number in range(len(rows)):
        row = rows[number]
        assert row["tokens"].tolist() == (stream + [end] * SEQ_LEN)[number * SEQ_LEN : (number + 1) * SEQ_LEN]
        counted += row_bytes(tokenizer, int(row["tokens"][0]), row["targets"][row["mask"]], end)
        seen = stream[: (number + 1) * SEQ_LEN + 1]
        document = seen[len(seen) - seen[::-1].index(end) :]
        before = sum(len(text.encode()) for text in texts[: seen.count(end) - 1])
        text = tokenizer.decode(document)
        if "\ufffd" not in text and len(seen) == (number + 1) * SEQ_LEN + 1:
            assert counted == before + len(text.encode())
            exact += 1
    assert exact > 5
    assert counted == sum(len(text.encode()) for text in texts)
    assert counted == load_manifest(tmp_path / "data").splits["held_out"].text_bytes


def loaded(tokenizer: str | None, max_rows: int, **data) -> LoadedModel:
    config = Config(
        model=ModelConfig(vocab_size=512, dim=16, max_seq_len=SEQ_LEN, n_heads=1, n_kv_heads=1, hidden_dim=16),
        data=DataConfig(seq_len=SEQ_LEN, **data),
        evaluation=EvaluationConfig(batch_size=8, max_rows=max_rows),
    )
    rows = tuple(load_manifest(Path(folder)).fingerprint for folder in config.data.mixture)
    mesh, trained_on = make_mesh(MeshConfig()), TrainedOn(rows)
    return LoadedModel(Path("x"), config, Mythos(config.model), {}, None, mesh, tokenizer, trained_on)


def targets(texts, tokenizer, rows):
    """The first targets of a split, and the bytes of the text in them."""
    end = tokenizer.end_of_document
    stream = [token for text in texts for token in [*tokenizer.encode(text).tolist(), end]][: rows * SEQ_LEN]
    # In byte-level BPE a byte is a character of the token's name.
    names = [tokenizer_kinds.backend("byte_level").id_to_token(token) for token in stream if token != end]
    return len(stream), sum(map(len, names))


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_first_rows_have_other_text_than_the_rest(with_tokenizer, tmp_path):
    """faults.md, 4: English first, much Chinese after it; and a mixture of the two."""
    spec = tokenizer_kinds.save("byte_level", tmp_path)
    tokenizer = load_tokenizer(spec)
    for name, texts in [("both", ENGLISH + RARE), ("en", ENGLISH), ("zh", RARE)]:
        prepared(tmp_path / name, tokenizer, texts)
    given = spec if with_tokenizer else None

    model = loaded(given, 10)
    batches, bytes_per_token = held_out_batches(model, str(tmp_path / "both"))
    n, size = targets(ENGLISH + RARE, tokenizer, 10)
    assert n == sum(batch["mask"].sum() for batch in batches) == 160
    assert bytes_per_token == size / n
    split = load_manifest(tmp_path / "both").splits["held_out"]
    assert abs(bytes_per_token * split.tokens / split.text_bytes - 1) > 0.2  # that of the split was said before

    mixture = {str(tmp_path / "en"): 0.5, str(tmp_path / "zh"): 0.5}
    batches, bytes_per_token = held_out_batches(loaded(given, 10, mixture=mixture), None)
    counts = np.sum([targets(texts, tokenizer, 10) for texts in (ENGLISH, RARE)], axis=0)
    assert bytes_per_token == counts[1] / counts[0]

    _, bytes_per_token = held_out_batches(loaded(given, 0), str(tmp_path / "both"))
    assert bytes_per_token == split.text_bytes / split.tokens


def test_of_conversations_the_answers_count(tmp_path):
    """Whatever the questions say; what ends an answer has no bytes."""
    answers = ["short", "漢字 and 🎉, longer", "a\nb"]
    folder = prepare(tmp_path, [dialogue(f"question {i}", text) for i, text in enumerate(answers)], seq_len=90)
    batches = list(eval_batches(folder, "train", batch_size=2))
    total = sum(len(text.encode()) for text in answers)
    assert measured_bytes(batches, folder, load_manifest(folder), None) == total
