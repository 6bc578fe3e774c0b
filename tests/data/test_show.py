"""`mythos data show`, against the record that is shown."""

import json
import re
import shutil

import pytest

from mythos_jax.data import storage
from tests.chats import dialogue, prepare, run, turn, write_model


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("show")
    messages = [turn("user", "a"), turn("assistant", "漢字 🎉"), turn("user", "c"), turn("assistant", "d", weight=0.5)]
    return prepare(path, [{"messages": messages}, dialogue("e", "f")], seq_len=120)


SHOWN = """\
--- sample 1
<|im_start|>user
a<|im_end|>
<|im_start|>assistant
[[漢字 🎉<|im_end|>]]
<|im_start|>user
c<|im_end|>
<|im_start|>assistant
[[0.5: d<|im_end|>]]

--- sample 2
<|im_start|>user
e<|im_end|>
<|im_start|>assistant
[[f<|im_end|>]]

"""


def test_a_row_of_conversations(chats, capsys):
    assert run("data", "show", chats) == 0
    head, _, text = capsys.readouterr().out.partition("\n")
    assert text == SHOWN
    found = re.fullmatch(r".*, train row 0 of 1: (\d+) tokens: (\d+) trained on, (\d+) not, (\d+) padding", head)
    total, trained, rest, padding = map(int, found.groups())
    assert total == trained + rest == 121 - padding


@pytest.mark.parametrize("kind", ["byte_level", "llama", "bytes"])
def test_the_tokens_of_a_row(kind, tmp_path, capsys):
    """The texts of the tokens, one after the other, are the text of the row; also of documents."""
    (tmp_path / "text.jsonl").write_text('{"text": "some text"}\n{"text": "more"}\n')
    tokenizer = "bytes" if kind == "bytes" else write_model(tmp_path / "model", None, kind)
    words = ["--tokenizer", tokenizer, "--seq-len", 40, "--held-out-fraction", 0, "--out", tmp_path / "out"]
    assert run("data", "prepare", tmp_path / "text.jsonl", *words) == 0
    capsys.readouterr()
    assert run("data", "show", tmp_path / "out", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    end = "<end of document>" if kind == "bytes" else "<|endoftext|>"
    text = "".join(token["text"] for token in tree["tokens"])
    assert text.replace(" ", "") == f"{end}some text{end}more{end}".replace(" ", "")
    assert (tree["chat"], tree["split"], tree["row"], tree["rows"]) == (False, "train", 0, 1)
    weights = [token["weight"] for token in tree["tokens"]]
    assert weights == [0.0] + [1.0] * (len(weights) - 1)
    # The end of a document belongs to it, and the first token, which is no target, to the first document.
    assert [token["segment"] for token in tree["tokens"] if token["text"] == end] == [1, 1, 2]
    assert run("data", "show", tmp_path / "out", "--tokens") == 0
    table = capsys.readouterr().out.splitlines()[2:]
    assert [json.loads(line.split(maxsplit=4)[4]) for line in table] == [token["text"] for token in tree["tokens"]]
    assert run("data", "show", tmp_path / "out") == 0
    assert f"--- document 2\n[[more{end}]]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--row", 1], "row: got 1, allowed: 0 to 0"),
        (["--split", "held_out"], "row: got 0, allowed: nothing: held_out has no rows"),
    ],
)
def test_what_is_not_there(words, reason, chats, capsys):
    assert run("data", "show", chats, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_no_folder(tmp_path, capsys):
    assert run("data", "show", tmp_path) == 2
    assert (
        capsys.readouterr().err
        == f"mythos: {tmp_path}: has no manifest.json; allowed: a folder made by `mythos data prepare`\n"
    )


def test_a_damaged_row(chats, tmp_path, capsys, monkeypatch):
    """Said at once: a run would look again for a minute, in case that storage is to blame."""
    monkeypatch.setattr(storage, "LASTING_PATIENCE", 1e6)
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    folder = shutil.copytree(chats, tmp_path / "copy")
    file = folder / "train-00000-of-00001.array_record"
    content = bytearray(file.read_bytes())
    content[64:128] = bytes(64)
    file.write_bytes(content)
    assert run("data", "show", folder) == 2
    assert "damaged" in capsys.readouterr().err
