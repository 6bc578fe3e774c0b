"""Text as it is decoded: whole characters only, and nothing lost."""

import numpy as np
import pytest

from mythos_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from mythos_jax.inference.detokenizer import StreamingDetokenizer, continuation_text
from tests import tokenizer_kinds

TEXT = "naïve — 漢字 😀\n"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_characters_come_whole(size):
    tokens = ByteTokenizer().encode(TEXT).tolist()
    detokenizer, told = StreamingDetokenizer(ByteTokenizer()), ""
    for start in range(0, len(tokens), size):
        new = detokenizer.add(tokens[start : start + size])
        told += new
        assert "\ufffd" not in new
        # What is not told yet is less than a character.
        assert len(bytes(tokens[: start + size])) - len(told.encode()) <= 3
    assert told == TEXT
    assert detokenizer.add([], last=True) == ""


def test_bytes_that_are_no_text_are_told_too():
    """As the whole would be decoded, and never more than three places late."""
    random = np.random.default_rng(0)
    tokens = random.choice([65, 0xC3, 0xA9, 0xE6, 0xBC, 0xF0, 0xFF], 300).tolist()
    detokenizer, told = StreamingDetokenizer(ByteTokenizer()), ""
    for n, token in enumerate(tokens):
        told += detokenizer.add([token])
        assert len(told) >= len(ByteTokenizer().decode(tokens[: n + 1])) - 3
    told += detokenizer.add([], last=True)
    assert told == ByteTokenizer().decode(tokens)
    assert told.count("\ufffd") > 50


def test_an_unfinished_character_comes_at_the_end():
    detokenizer = StreamingDetokenizer(ByteTokenizer())
    assert detokenizer.add([*b"ab\xf0\x9f"]) == "ab"
    assert detokenizer.add([], last=True) == "\ufffd"


@pytest.mark.parametrize("kind", ["llama", "metaspace", "unigram_bytes", "end_of_word"])
def test_the_space_after_a_prompt_is_there(kind, tmp_path):
    """faults.md, 3: "Once upon a timethere"."""
    tokenizer = load_tokenizer(tokenizer_kinds.save(kind, tmp_path))
    prompt, whole = tokenizer.encode("the lazy").tolist(), tokenizer.encode("the lazy dog").tolist()
    assert whole[: len(prompt)] == prompt
    assert continuation_text(tokenizer, prompt, whole[len(prompt) :]) == " dog"
    # Nothing comes before a text that is not continued.
    assert continuation_text(tokenizer, [tokenizer.end_of_document], whole) == "the lazy dog"


def test_characters_of_byte_fallback_come_whole(tmp_path):
    """faults.md, 2: they came as one replacement for each byte."""
    tokenizer = load_tokenizer(tokenizer_kinds.save("llama", tmp_path))
    text = "Tokyo: 今日は天気が良いです。\nTokyo: "
    tokens = tokenizer.encode(text).tolist()
    assert sum(token in tokenizer.fallback_bytes for token in tokens) > 20
    detokenizer = StreamingDetokenizer(tokenizer)
    pieces = [detokenizer.add([token]) for token in tokens]
    assert "".join(pieces) + detokenizer.add([], last=True) == text


def test_a_character_that_a_prompt_began():
    """The prompt's half of it is not text yet; the whole of it is the continuation's."""
    half, rest = [*b"a\xe6\xbc"], [*b"\xa2b"]
    assert continuation_text(ByteTokenizer(), half, rest) == "漢b"
    assert continuation_text(ByteTokenizer(), half, [*b"b"]) == "b"
