"""Text as it is decoded: whole characters only, and nothing lost."""

import numpy as np
import pytest

from mythos_jax.data.tokenizer import ByteTokenizer
from mythos_jax.inference.text import StreamingDetokenizer

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
