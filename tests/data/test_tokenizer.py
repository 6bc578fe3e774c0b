"""Tokenizers: bytes, and a `tokenizer.json` compared with the `tokenizers` library."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.errors import ConfigError
from tests import tokenizer_kinds

TEXTS = ["def main():\n    return 0\n", "naïve café — 日本語 🙂\r\n\ttab", "", "a" * 50]


def train_bpe(specials=("<|endoftext|>",)):
    """A byte-level BPE tokenizer with 300 tokens, followed by special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(special, special=True) for special in specials])
    return tokenizer


@pytest.fixture
def bpe(tmp_path):
    backend = train_bpe()
    backend.save(str(tmp_path / "tokenizer.json"))
    return backend, tmp_path / "tokenizer.json"


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_utf8_and_decode_to_the_text(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_special_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.end_of_document, tokenizer.padding, tokenizer.vocab_size) == (256, 257, 258)
    assert (
        tokenizer.decode([104, 256, 105, 257, 263]) == "hi"
    )  # special tokens, and ids of a model with a larger vocabulary
    assert tokenizer.decode([0xE6, 0x97]) == "�"  # the first two bytes of a three-byte character
    assert tokenizer.encode(b"\xff".decode("utf-8", "surrogateescape")).tolist() == [0xFF]  # as in sys.argv


def test_a_tokenizer_json_gives_the_ids_of_the_library(bpe):
    backend, path = bpe
    tokenizer = load_tokenizer(str(path))
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == backend.encode(text).ids == tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])  # tokens are merged


def test_the_vocabulary_includes_added_special_tokens(tmp_path):
    backend = train_bpe(["<pad>", "</s>"])
    backend.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.end_of_document == backend.token_to_id("</s>") == backend.get_vocab_size() - 1
    assert tokenizer.vocab_size == tokenizer.end_of_document + 1
    assert tokenizer.vocab_size > backend.get_vocab_size(with_added_tokens=False)
    ids = tokenizer.encode("main")
    assert tokenizer.decode([*ids, tokenizer.end_of_document, 10**6]) == "main"


def test_special_tokens_are_not_recognised_in_text(bpe):
    tokenizer = load_tokenizer(bpe[1])
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_saved_truncation_and_padding_are_ignored(bpe):
    backend, path = bpe
    expected = backend.encode(TEXTS[0]).ids
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(path))
    assert load_tokenizer(path).encode(TEXTS[0]).tolist() == expected


def test_the_fingerprint_depends_on_the_content_alone(bpe, tmp_path):
    _, path = bpe
    fingerprint = load_tokenizer(path).fingerprint
    (tmp_path / "again.json").write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert load_tokenizer(tmp_path / "again.json").fingerprint == fingerprint
    train_bpe(["</s>"]).save(str(tmp_path / "other.json"))
    others = {load_tokenizer(tmp_path / "other.json").fingerprint, load_tokenizer("bytes").fingerprint}
    assert len(others | {fingerprint}) == 3


def test_save(bpe, tmp_path):
    _, path = bpe
    (tmp_path / "saved").mkdir()
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved" / "tokenizer.json").fingerprint == tokenizer.fingerprint
    load_tokenizer("bytes").save(tmp_path / "nowhere")  # writes nothing


def test_unusable_tokenizers(tmp_path):
    with pytest.raises(ConfigError, match=r"no-such\.json: cannot be read \(No such file.*allowed: bytes"):
        load_tokenizer(tmp_path / "no-such.json")
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.json: not JSON"):
        load_tokenizer(tmp_path / "text.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"other\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path / "other.json")
    train_bpe([]).save(str(tmp_path / "endless.json"))
    with pytest.raises(ConfigError, match=r"endless\.json: has no end-of-document token; allowed: one of <\|endoftext"):
        load_tokenizer(tmp_path / "endless.json")
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="?")).save(str(tmp_path / "words.json"))
    with pytest.raises(ConfigError, match=r"words\.json: cannot encode the text"):
        load_tokenizer(tmp_path / "words.json").encode("b")


def test_an_end_of_document_token_of_another_name(tmp_path):
    backend = train_bpe(["<pad>", "<doc>", "</s>"])
    backend.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").end_of_document == backend.token_to_id("</s>")
    named = load_tokenizer(tmp_path / "t.json", "<doc>")
    assert named.end_of_document == backend.token_to_id("<doc>")
    assert named.fingerprint == load_tokenizer(tmp_path / "t.json").fingerprint  # the same text gives the same ids
    with pytest.raises(ConfigError, match=r"^end_of_document: got '<end>', allowed: a token of .*, such as <pad>, <do"):
        load_tokenizer(tmp_path / "t.json", "<end>")
    for word in ["a", "Ġ"]:  # would end documents wherever it occurs
        assert backend.token_to_id(word) is not None
        with pytest.raises(ConfigError, match=rf"^end_of_document: got '{word}', allowed: a token of .* no text con"):
            load_tokenizer(tmp_path / "t.json", word)
    with pytest.raises(ConfigError, match=r"^end_of_document: got '<doc>', allowed: none with tokenizer bytes"):
        load_tokenizer("bytes", "<doc>")


def test_the_folder_of_a_tokenizer(bpe):
    assert load_tokenizer(bpe[1].parent).fingerprint == load_tokenizer(bpe[1]).fingerprint


def test_special_tokens_have_a_name(tmp_path):
    for kind in ("byte_level", "llama", "word_piece"):
        backend = tokenizer_kinds.backend(kind)
        tokenizer = load_tokenizer(tokenizer_kinds.save(kind, tmp_path))
        for name in (tokenizer_kinds.END, tokenizer_kinds.OTHER):
            assert tokenizer.special_token(name) == backend.token_to_id(name)
            assert tokenizer.visible([1, backend.token_to_id(name), 10**6]) == [1]
        assert tokenizer.special_token("the") is None
    assert load_tokenizer("bytes").special_token(tokenizer_kinds.END) is None


def test_a_stop_word_of_the_vocabulary_ends_documents(tmp_path):
    """An end-of-document token that was never declared special: text when decoded, and still the end."""
    Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")).save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert tokenizer.special_token("</s>") == tokenizer.end_of_document == 1
