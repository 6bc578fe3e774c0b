"""Rows of packed conversations: nothing is lost, nothing is seen twice, and the same at every start."""

import gzip
import hashlib
import json
import re
import shutil
import threading
from concurrent.futures import CancelledError
from datetime import date, datetime, timedelta
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mythos_jax.data import text_parts, units
from mythos_jax.data.chat_encoder import make_chat_encoder
from mythos_jax.data.chat_record import parse_record
from mythos_jax.data.chat_template import ChatTemplate
from mythos_jax.data.manifest import load_manifest
from mythos_jax.data.pipeline import eval_batches, train_batches
from mythos_jax.data.rows import TokenRows
from mythos_jax.data.tokenizer import load_tokenizer
from tests.chats import CHATML, dialogue, golden_template, prepare, run, samples, turn, write_chats, write_model


def many(n, seed=0):
    """Dialogues of 1 to 3 turns."""
    rng = np.random.default_rng(seed)
    return [
        dialogue(*(f"{'ab '[j % 2]}{i} " * rng.integers(1, 8) for j in range(2 * rng.integers(1, 4)))) for i in range(n)
    ]


def encoded(model, records, room):
    encoder = make_chat_encoder(model, load_tokenizer(model), "", room - 1)
    found = [sample for record in records for sample in encoder.encode(parse_record(record)).samples]
    return [(sample.tokens.tolist(), sample.weights.tolist()) for sample in found]


def test_every_conversation_is_in_one_row_as_it_is(tmp_path):
    records, model = many(60), write_model(tmp_path / "model")
    folder = prepare(tmp_path, records, model=model, seq_len=400)
    assert sorted(samples(folder)) == sorted(encoded(model, records, 401))
    manifest = load_manifest(folder)
    rows, counts = TokenRows(folder, "train"), manifest.chat.splits["train"]
    batch = rows.read(range(len(rows)))
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "tokens": (np.int32, (len(rows), 400)),
        "targets": (np.int32, (len(rows), 400)),
        "mask": (np.float32, (len(rows), 400)),
        "segment_ids": (np.int32, (len(rows), 400)),
    }
    # A target that counts belongs to the conversation of the token before it.
    for row in range(len(rows)):
        ids, weights, numbers = rows.stream(row)
        real = len(ids) - 1
        assert (batch["mask"][row, :real] == weights[1:]).all()
        assert (numbers[1:][weights[1:] > 0] == batch["segment_ids"][row, :real][weights[1:] > 0]).all()
        assert not batch["mask"][row, real:].any()
        assert not batch["segment_ids"][row, len(ids) :].any()
    assert (batch["mask"] > 0).sum() == counts.trained == manifest.splits["train"].tokens
    assert counts.trained + counts.masked + counts.padding == batch["mask"].size
    assert manifest.splits["train"].documents == counts.samples == 60
    # Best fit wastes little: what one conversation per row, or the order of the file, would not.
    assert counts.padding / batch["mask"].size < 0.1


def test_the_rows_do_not_depend_on_workers_nor_on_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(text_parts, "UNIT_BYTES", 2000)
    records, model = many(40), write_model(tmp_path / "model")
    whole = prepare(tmp_path, records, "--workers", 1, model=model, seq_len=150, out="whole")
    assert (
        load_manifest(whole).fingerprint
        == load_manifest(prepare(tmp_path, records, "--workers", 3, model=model, seq_len=150, out="three")).fingerprint
    )

    store, stored = units._store_unit, []

    def store_two(files, part, number, unit):
        store(files, part, number, unit)
        stored.append(number)
        if len(stored) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(units, "_store_unit", store_two)
    words = ["data", "prepare", tmp_path / "chats.jsonl", "--chat", "--tokenizer", model, "--seq-len", 150]
    words += ["--held-out-fraction", 0, "--workers", 1]
    assert run(*words, "--out", tmp_path / "killed") == 130
    monkeypatch.setattr(units, "_store_unit", lambda *a: stored.append(a[2]) or store(*a))
    stored.clear()
    assert run(*words, "--out", tmp_path / "killed") == 0
    assert 0 not in stored  # the first unit was not tokenized again
    for name in ["train-00000-of-00001.array_record", "tokenizer.json", "tokenizer_config.json"]:
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()
    assert run(*words, "--out", tmp_path / "killed") == 0  # nothing to do


def test_long_conversations_are_cut_at_turns_and_keep_their_system_message(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    record = dialogue(*(text for i in range(6) for text in (f"question {i}", f"answer {i}")), system="Be brief.")
    folder = prepare(tmp_path, [record], model=model, seq_len=110)
    tokenizer = load_tokenizer(model)
    texts = [tokenizer.spell(ids) for ids, _ in samples(folder)]
    assert len(texts) > 1
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert all(text.startswith(f"{system}<|im_start|>user\n") for text in texts)
    whole = system + "".join(sorted(text.removeprefix(system) for text in texts))
    assert whole == tokenizer.spell(encoded(model, [record], 10**6)[0][0])
    # Each is as long as it may be: the first question of the next part would not have fitted with its answer.
    trained = "".join(
        tokenizer.spell(i for i, w in zip(*sample, strict=True) if w) for sample in sorted(samples(folder))
    )
    assert sorted(trained.split("<|im_end|>")[:-1]) == [f"answer {i}" for i in range(6)]
    counts = load_manifest(folder).chat.splits["train"]
    assert (counts.cut, counts.truncated, counts.answers, counts.samples) == (1, 0, 6, len(texts))
    assert "1 conversation is longer than a row of 110 targets, and is cut at turns" in capsys.readouterr().err


def test_a_turn_that_is_too_long_loses_its_end_and_is_counted(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    records = [dialogue("q", "word " * 100), dialogue("word " * 100, "lost"), dialogue("q", "a")]
    folder = prepare(tmp_path, records, model=model, seq_len=63)
    counts = load_manifest(folder).chat.splits["train"]
    (long, _), _ = encoded(model, records[:1], 10**6)[0], None
    found = sorted(samples(folder), key=lambda sample: len(sample[0]))
    assert found[1][0] == long[:64]
    assert (counts.truncated, counts.without_answer, counts.samples, counts.answers) == (2, 1, 2, 2)
    dropped = sum(len(ids) - 64 for ids, _ in encoded(model, records[:2], 10**6))
    assert counts.dropped == dropped
    err = capsys.readouterr().err
    assert f"2 turns are longer than a row; what is too much, {dropped:,} tokens, is cut off" in err
    assert "1 sample is left out, because no token of an answer that is trained on has room" in err
    # They are whole but for their ends, and the answer of the first one lacks that which ends it.
    assert (counts.cut, counts.unended) == (0, 1)
    assert "cut at turns" not in err
    assert "1 answer without the token that ends one" in err


def test_an_answer_that_is_cut_off_is_not_counted(tmp_path):
    """Two answers of one turn, of which the second has no room."""
    messages = [turn("user", "q"), turn("assistant", "a"), turn("assistant", "word " * 100)]
    model = write_model(tmp_path / "model")
    ids, weights = encoded(model, [{"messages": messages}], 10**6)[0]
    first = weights.index(0, weights.index(1))  # the end of the first answer
    folder = prepare(tmp_path, [{"messages": messages}], model=model, seq_len=first)
    counts = load_manifest(folder).chat.splits["train"]
    assert samples(folder) == [(ids[: first + 1], weights[: first + 1])]
    assert (counts.answers, counts.unended, counts.truncated, counts.cut) == (1, 0, 1, 0)


def test_completions_that_begin_inside_a_token(tmp_path, capsys):
    """Counted; and one of which no token can be learnt is left out, where only its end would be."""
    merged = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, " ": 3, "<|im_end|>": 4}, [("a", "b")]))
    merged.add_special_tokens(["<|im_end|>"])
    model = write_model(tmp_path / "model", None)
    merged.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    pairs = [("a", "b"), ("a", " b"), ("aa", "bb"), ("a", "a")]
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    folder = prepare(tmp_path, records, model=model)
    counts = load_manifest(folder).chat.splits["train"]
    assert (counts.joined, counts.answers, counts.samples, counts.without_answer) == (2, 3, 3, 1)
    assert sorted(samples(folder)) == [
        ([0, 0, 4], [0.0, 1.0, 1.0]),
        ([0, 2, 1, 4], [0.0, 1.0, 1.0, 1.0]),
        ([0, 3, 1, 4], [0.0, 1.0, 1.0, 1.0]),
    ]
    assert "2 completions of a text: the first token begins in the prompt" in capsys.readouterr().err


def test_a_rewriting_template_keeps_the_newest_turns_of_a_long_conversation(tmp_path):
    model = write_model(tmp_path / "model", golden_template("qwen3"))
    record = dialogue(*(f"<think>\n{i}\n</think>\n\n{i}" if i % 2 else f"question {i}" for i in range(8)), system="s")
    folder = prepare(tmp_path, [record], model=model, seq_len=120)
    counts = load_manifest(folder).chat.splits["train"]
    assert (counts.by_answer, counts.cut, counts.answers, counts.samples) == (1, 1, 4, 4)
    tokenizer = load_tokenizer(model)
    for ids, weights in samples(folder):
        text, trained = tokenizer.spell(ids), tokenizer.spell(i for i, w in zip(ids, weights, strict=True) if w)
        assert text.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n")
        number = trained[-len("7<|im_end|>")]
        assert trained == f"<think>\n{number}\n</think>\n\n{number}<|im_end|>"
        assert text.endswith(trained + "\n")


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_twice_as_long_a_conversation_takes_twice_the_work(name, tmp_path, monkeypatch):
    """The template writes a number of texts that grows as the conversation does, not as its square; of messages, if
    every answer has a text of its own, in which few of them have room."""
    model = write_model(tmp_path / "model", golden_template(name))
    encoder, render, count = make_chat_encoder(model, load_tokenizer(model), "", 120), ChatTemplate.render_marked, 0

    def counting(template, messages, **settings):
        nonlocal count
        count += len(messages) if name == "qwen3" else 1
        return render(template, messages, **settings)

    monkeypatch.setattr(ChatTemplate, "render_marked", counting)
    taken = []
    for turns in (40, 80, 160):
        texts = (f"<think>\n{i}\n</think>\n\n{i}" if i % 2 and name == "qwen3" else f"text {i}" for i in range(turns))
        count, record = 0, parse_record(dialogue(*texts))
        assert encoder.encode(record).cut
        taken.append(count)
    assert taken[2] - taken[1] < 2.5 * (taken[1] - taken[0])
    assert taken[2] < (20 if name == "qwen3" else 3) * 160

    stop = threading.Event()
    stop.set()
    count = 0
    with pytest.raises(CancelledError):
        encoder.encode(record, stop)
    assert count == 0


def test_equal_conversations_are_on_the_same_side(tmp_path):
    """A hash of what they say decides, not where they are; a copy of what is held out is not trained on."""
    model = write_model(tmp_path / "model")
    records = many(40)
    folder = prepare(tmp_path, [*records, *records[::-1]], "--held-out-fraction", 0.3, model=model, seq_len=300)
    train, held_out = ({str(sample) for sample in samples(folder, split)} for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 40
    assert len(held_out) > 4
    assert not train & held_out
    moved = prepare(tmp_path, records[5:], "--held-out-fraction", 0.3, model=model, seq_len=300, out="fewer")
    assert {str(sample) for sample in samples(moved, "held_out")} <= held_out


def test_a_single_conversation_is_trained_on(tmp_path, capsys):
    folder = prepare(tmp_path, many(1), "--held-out-fraction", 0.05)
    assert load_manifest(folder).splits["held_out"].rows == 0
    assert "there is only one conversation; it is trained on, and nothing is held out" in capsys.readouterr().err


def test_files_of_all_kinds(tmp_path):
    records, model = many(9), write_model(tmp_path / "model")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_chats(corpus / "a.jsonl", records[:3])
    (corpus / "b.json").write_text(json.dumps(records[3:5]))
    write_chats(tmp_path / "c", records[5:6])
    (corpus / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "c").read_bytes()))
    table = [{**record, "prompt": None, "completion": None} for record in records[6:]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), corpus / "d.parquet")
    (corpus / "e.csv").write_text('prompt,completion,note\n"The sky, is"," blue.",x\n')
    (corpus / "readme.md").write_text("left out")
    (corpus / "package.json").write_text('{"name": "left out"}')
    records.append({"prompt": "The sky, is", "completion": " blue."})
    words = ["data", "prepare", corpus, "--chat", "--tokenizer", model, "--seq-len", 300, "--held-out-fraction", 0]
    assert run(*words, "--out", tmp_path / "out") == 0
    assert sorted(samples(tmp_path / "out")) == sorted(encoded(model, records, 301))
    assert any("1 .md" in line for line in load_manifest(tmp_path / "out").left_out)


def test_max_bytes_leaves_whole_conversations(tmp_path):
    records, model = many(30), write_model(tmp_path / "model")
    folder = prepare(tmp_path, records, "--max-bytes", 1500, model=model, seq_len=300)
    found = samples(folder)
    assert 1 < len(found) < 20
    assert sorted(found) == sorted(encoded(model, records[: len(found)], 301))


def test_a_mixture_with_text_has_weights_and_segments_everywhere(tmp_path):
    model = write_model(tmp_path / "model")
    chats = prepare(tmp_path, many(20), model=model, seq_len=100, out="chats")
    (tmp_path / "text.jsonl").write_text('{"text": "some text, and more of it"}\n' * 20)
    words = ["data", "prepare", tmp_path / "text.jsonl", "--tokenizer", model, "--seq-len", 100]
    assert run(*words, "--out", tmp_path / "text") == 0
    batches = train_batches({chats: 1.0, tmp_path / "text": 1.0}, batch_size=2, seed=0, threads=0)
    batch = next(batches)
    assert (batch["mask"].dtype, batch["segment_ids"].dtype) == (np.float32, np.int32)
    plain = next(train_batches(tmp_path / "text", batch_size=1, seed=0, threads=0))
    assert set(plain) == {"tokens", "targets", "mask"}
    text = next(row for row in range(2) if batch["mask"][row, 0])  # a conversation does not begin with an answer
    assert (batch["mask"][text] == batch["segment_ids"][text]).all()
    padded = list(eval_batches(chats, "train", batch_size=7))[-1]
    assert not padded["mask"][-1].any()
    assert not padded["segment_ids"][-1].any()


def test_text_is_read_as_it_was(tmp_path):
    """The manifest of text has no new key, and its fingerprint is that of 0.1.0: the hash of what the rows are."""
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    assert run("data", "prepare", tmp_path / "text.txt", "--seq-len", 32, "--out", tmp_path / "out") == 0
    tree = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "chat" not in tree
    names = ("seq_len", "dtype", "tokenizer_fingerprint", "vocab_size", "end_of_document", "splits", "version")
    content = {name: tree[name] for name in names} | {"version": 1}
    for split in content["splits"].values():
        for key in ("file_bytes", "sha256", "row_bytes", "shards"):
            del split[key]
    assert tree["fingerprint"] == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


WRONG = {
    "no answer": ({"messages": [turn("user", "a")]}, "no message of the role assistant"),
    "unknown role": ({"messages": [turn("bot", "a")]}, r"messages\[0\].role: got 'bot', allowed: system, user"),
    "empty": (dialogue("a", " "), r"messages\[1\].content: is empty"),
    "null": ({"messages": [turn("user", None), turn("assistant", "b")]}, r"messages\[0\].content: is empty"),
    "picture": ({"messages": [turn("user", [{"type": "image_url"}])]}, r"content\[0\]: got image_url, allowed: a text"),
    "weight": ({"messages": [turn("user", "a"), turn("assistant", "b", weight=2)]}, "weight: got 2, allowed: a number"),
    "weight of a question": (
        {"messages": [turn("user", "a", weight=1), turn("assistant", "b")]},
        "weight: got 1, allowed: 0 for the role user",
    ),
    "no weight": ({"messages": [turn("user", "a"), turn("assistant", "b", weight=0)]}, "has the weight 0"),
    "no messages": ({"text": "a"}, "no messages, and not both prompt and completion; it has text"),
    "text": ({"messages": "hello"}, "messages: got a text, allowed: a list of messages"),
    "mixed": ({"prompt": "a", "completion": [turn("assistant", "b")]}, "got a text and a list, allowed: two texts"),
    "both": ({**dialogue("a", "b"), "prompt": "a", "completion": "b"}, "has messages, and prompt or completion too"),
    "no completion": ({"prompt": "a", "completion": ""}, "completion: is empty"),
    "surrogate": ({"prompt": "a", "completion": "\ud800"}, "text is not valid Unicode"),
    "tools": ({**dialogue("a", "b"), "tools": "x"}, "tools: not JSON"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": 1}]}, r"tool_calls: got a number, allowed: a list"),
    "tools beside texts": (
        {"prompt": "a", "completion": "b", "tools": [{"type": "function"}]},
        "has tools beside two texts; allowed: only with messages",
    ),
    "not an object": ([1], "got a list, allowed: an object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_record_that_is_no_conversation(case, tmp_path, capsys):
    """One line, nothing written; or it is left out and counted."""
    record, reason = WRONG[case]
    model = write_model(tmp_path / "model")
    source = write_chats(tmp_path / "chats.jsonl", [dialogue("a", "b"), record])
    words = ["data", "prepare", source, "--chat", "--tokenizer", model, "--seq-len", 64, "--out", tmp_path / "out"]
    before = sorted(tmp_path.iterdir())
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"mythos: source {source}, line 2: ")
    assert re.search(reason, line)
    assert sorted(tmp_path.iterdir()) == before
    assert run(*words, "--on-error", "skip", "--held-out-fraction", 0) == 0
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.left_out_count, manifest.splits["train"].documents) == (1, 1)


def parquet(path, column, kind=None):
    """A file of two rows, whose answers have a field of this type; null in the first row."""
    fields = [("role", pyarrow.string()), ("content", pyarrow.string()), ("extra", kind or pyarrow.array(column).type)]
    rows = [[turn("user", "a"), turn("assistant", "b", extra=extra)] for extra in (None, *column)]
    array = pyarrow.array(rows, pyarrow.list_(pyarrow.struct(fields)))
    pyarrow.parquet.write_table(pyarrow.table({"messages": array}), path)
    return path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05"),
        (date(2026, 1, 2), "2026-01-02"),
        (timedelta(seconds=90), "0:01:30"),
        (Decimal("1.50"), "1.50"),
    ],
)
def test_columns_of_parquet_that_json_has_no_word_for(value, text, tmp_path):
    """They reach the template as texts."""
    template = CHATML.replace("m.content", "m.content + (m.extra or '')")
    model = write_model(tmp_path / "model", template)
    words = ["data", "prepare", parquet(tmp_path / "a.parquet", [value]), "--chat", "--tokenizer", model]
    assert run(*words, "--seq-len", 300, "--held-out-fraction", 0, "--out", tmp_path / "out") == 0
    found = [load_tokenizer(model).spell(ids) for ids, _ in samples(tmp_path / "out")]
    assert sorted(f"b{text}<|im_end|>" in row for row in found) == [False, True]


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        (b"\xff", None, r"row 2: messages\[1\].extra: got bytes, allowed: what JSON can hold"),
        (2**62, pyarrow.timestamp("us"), "cannot be read near row 1"),
    ],
)
def test_columns_of_parquet_that_cannot_be_text(value, kind, reason, tmp_path, capsys):
    model = write_model(tmp_path / "model")
    source = parquet(tmp_path / "a.parquet", [value], kind)
    words = ["data", "prepare", source, "--chat", "--tokenizer", model, "--out", tmp_path / "out"]
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(reason, line)
    write_chats(tmp_path / "b.jsonl", [dialogue("c", "d")])
    assert run(*words[:3], tmp_path / "b.jsonl", *words[3:], "--on-error", "skip") == 0
    assert load_manifest(tmp_path / "out").left_out_count == 1


@pytest.mark.parametrize("skips", [False, True])
def test_a_conversation_that_the_template_refuses(skips, tmp_path, capsys):
    """As a bad record; and a run that stops is not content with what one that skips has left."""
    model = write_model(tmp_path / "model", golden_template("mistral"))
    records = [dialogue("a", "b"), dialogue("a", "b", system="not with this one"), dialogue("c", "d")]
    source = write_chats(tmp_path / "chats.jsonl", records)
    words = ["data", "prepare", source, "--chat", "--tokenizer", model, "--seq-len", 64, "--out", tmp_path / "out"]
    if skips:
        assert run(*words, "--on-error", "skip") == 0
        assert load_manifest(tmp_path / "out").left_out_count == 1
        shutil.rmtree(tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert run(*words) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"mythos: source {source}, line 2: chat template of {model}: Roles must alternate")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tokenizer", "MODEL", "--seq-len", 1], "seq_len: got 1, allowed for .*: more than 1"),
        (["--chat-template", "nowhere"], "chat template nowhere: cannot be read"),
        (["--chat-template", "BROKEN"], "chat template .*: line 1: "),
        (["--tokenizer", "bytes"], "line 1: has messages, and the tokenizer has no chat template; allowed: "),
        (["--text-column", "body"], "text_column: got 'body', allowed: nothing with conversations"),
        (["SOURCE", "stdlib"], "source stdlib: no such file; allowed"),
        (["SOURCE", "TEXT"], r"not a file of records; allowed: \.jsonl"),
    ],
)
def test_what_cannot_be_asked_for(words, reason, tmp_path, capsys):
    model = write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "broken").write_text("{% if")
    source = write_chats(tmp_path / "chats.jsonl", [dialogue("a", "b")])
    names = {"MODEL": model, "BROKEN": tmp_path / "broken", "TEXT": tmp_path / "text.txt"}
    words = [names.get(word, word) for word in words]
    if words[0] == "SOURCE":
        source, words = words[1], []
    flags = {"--tokenizer": model, "--seq-len": 64} | dict(zip(words[::2], words[1::2], strict=True))
    before = sorted(tmp_path.iterdir())
    flat = [word for pair in flags.items() for word in pair]
    assert run("data", "prepare", source, "--chat", "--out", tmp_path / "out", *flat) == 2
    err = capsys.readouterr().err
    assert re.search(reason, err), err
    # Where all was tokenized, and only then was found to be too long, that is kept.
    assert [path for path in sorted(tmp_path.iterdir()) if ".partial-" not in path.name] == before


def test_another_template_or_text_in_place_of_conversations_is_refused(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    folder = prepare(tmp_path, many(3), model=model, seq_len=300)
    words = ["data", "prepare", tmp_path / "chats.jsonl", "--tokenizer", model, "--seq-len", 300, "--out", folder]
    words += ["--held-out-fraction", 0]
    assert run(*words) == 2
    assert "chat: got False, allowed: True, with which" in capsys.readouterr().err
    (tmp_path / "other.jinja").write_text(CHATML + " ")
    assert run(*words, "--chat", "--chat-template", tmp_path / "other.jinja") == 2
    assert "chat_template: got another chat template" in capsys.readouterr().err
